//! Pure: every setting of the verbs wire, with default, unit and reason.

use crate::TransportError;

/// Settings of the verbs wire. Binaries and Python's `init` fill it from flags and the environment; below that, it is passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerbsConfig {
    /// Devices to use, in NCCL's grammar (`GRADWIRE_IB_HCA`): `mlx5_0:1,mlx5_1` names that begin so, with a port if
    /// given; `=mlx5_0` exactly; `^mlx5_2` not these. Default: any.
    pub hca: Option<String>,
    /// Index of the port's address table (`GRADWIRE_IB_GID_INDEX`). Default: chosen, see [`super::gid::choose`].
    pub gid_index: Option<u8>,
    /// Queue pairs per peer (`GRADWIRE_IB_QUEUE_PAIRS`). Default 1; more give switches more flows to spread.
    pub queue_pairs: usize,
    /// Traffic class of every packet (`GRADWIRE_IB_TRAFFIC_CLASS`): 4 × DSCP + ECN bits. Default 0; 106 is usual where the
    /// network has a lossless class.
    pub traffic_class: u8,
    /// Service level, 0 to 15 (`GRADWIRE_IB_SERVICE_LEVEL`). Default 0.
    pub service_level: u8,
    /// How long the device waits for an answer, as the exponent in 4.096 µs × 2ⁿ, 1 to 31 (`GRADWIRE_IB_TIMEOUT`). Default
    /// 14, 67 ms: with the retries, a dead peer shows in less than a second. Networks whose links flap want 18 to 20.
    pub timeout: u8,
    /// How often it asks again, 0 to 6 (`GRADWIRE_IB_RETRIES`). Default 6, not 7: soft-RoCE takes 7 for "for ever".
    pub retries: u8,
    /// Longest message sent before the receiver has asked for it, in bytes. Default 8,128: what a frame of two pages holds.
    pub eager_bytes: usize,
    /// Frames that each end holds for each direction of a queue pair; rounded down to a power of two. Default 64, about
    /// 512 KiB.
    pub slots: usize,
    /// Memory of callers that stays registered, at most, in bytes. Default 512 MiB: it cannot be swapped.
    pub cache_bytes: usize,
    /// Memory of the wire's own for frames and copies, at most, in bytes. Default 256 MiB.
    pub pool_bytes: usize,
}

impl Default for VerbsConfig {
    fn default() -> Self {
        Self {
            hca: None,
            gid_index: None,
            queue_pairs: 1,
            traffic_class: 0,
            service_level: 0,
            timeout: 14,
            retries: 6,
            eager_bytes: 8128,
            slots: 64,
            cache_bytes: 512 << 20,
            pool_bytes: 256 << 20,
        }
    }
}

impl VerbsConfig {
    /// Refuses values that no device takes, or that would wait for ever.
    ///
    /// # Errors
    /// `Config`, with the bounds.
    pub fn check(&self) -> Result<(), TransportError> {
        for (setting, value, least, most) in [
            ("GRADWIRE_IB_QUEUE_PAIRS", self.queue_pairs, 1, 8),
            ("GRADWIRE_IB_SERVICE_LEVEL", self.service_level.into(), 0, 15),
            ("GRADWIRE_IB_TIMEOUT", self.timeout.into(), 1, 31),
            ("GRADWIRE_IB_RETRIES", self.retries.into(), 0, 6),
            ("verbs eager_bytes", self.eager_bytes, 256, 8128),
            ("verbs slots", self.slots, 4, 256),
        ] {
            if !(least..=most).contains(&value) {
                let reason = format!("{value} is not from {least} to {most}");
                return Err(TransportError::Config { setting: setting.to_owned(), reason });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_allowed_and_endless_retries_are_not() {
        VerbsConfig::default().check().unwrap();
        let error = VerbsConfig { retries: 7, ..VerbsConfig::default() }.check().unwrap_err();
        assert_eq!(error.to_string(), "GRADWIRE_IB_RETRIES: 7 is not from 0 to 6");
        assert!(VerbsConfig { timeout: 0, ..VerbsConfig::default() }.check().is_err());
    }

    #[test]
    fn the_defaults_that_readme_tells_are_these() {
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
        let readme = std::fs::read_to_string(file).unwrap();
        let told = |name: &str| {
            let row = readme.lines().find(|line| line.starts_with(&format!("| `{name}`"))).expect(name);
            row.split('|').nth(3).expect("a row has three columns").trim().to_owned()
        };
        let VerbsConfig { hca, gid_index, queue_pairs, traffic_class, service_level, timeout, retries, .. } =
            VerbsConfig::default();
        assert_eq!((hca, told("GRADWIRE_IB_HCA").as_str()), (None, "any"));
        assert!(gid_index.is_none() && told("GRADWIRE_IB_GID_INDEX").starts_with("the RoCE v2 one"));
        assert!(told("GRADWIRE_IB_QUEUE_PAIRS").starts_with(&format!("{queue_pairs};")));
        assert_eq!(traffic_class, service_level, "one row tells of both");
        assert!(told("GRADWIRE_IB_TRAFFIC_CLASS").starts_with(&format!("{traffic_class};")));
        let milliseconds = 4.096e-3 * f64::from(1u32 << timeout);
        assert_eq!(told("GRADWIRE_IB_TIMEOUT"), format!("{timeout} ({milliseconds:.0} ms), {retries}"));
    }
}
