//! Pure: what the members of a measurement have seen, as one row of a table.

use super::device::Refused;
use super::receiver::Taken;
use super::sender::Pushed;
use crate::collective::Way;
use crate::statistics::{jain, percentile, sorted};
use serde::Serialize;

/// A link's rate and the buffer of the switch before it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Shape {
    /// In tc's words.
    pub(crate) rate: String,
    /// In tc's words.
    pub(crate) buffer: String,
    /// The rate in bytes.
    pub(crate) gb_per_s: f64,
}

impl std::str::FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not RATE:BUFFER, such as 1gbit:64kb");
        let (rate, buffer) = text.split_once(':').filter(|(_, buffer)| !buffer.is_empty()).ok_or_else(wrong)?;
        let (number, unit) = rate.split_at(rate.find(char::is_alphabetic).ok_or_else(wrong)?);
        let bits = match unit {
            "gbit" => 1e9,
            "mbit" => 1e6,
            "kbit" => 1e3,
            _ => return Err(wrong()),
        };
        let number: f64 = number.parse().ok().filter(|number| *number > 0.0).ok_or_else(wrong)?;
        Ok(Self { rate: rate.to_owned(), buffer: buffer.to_owned(), gb_per_s: number * bits / 8e9 })
    }
}

/// What of a link's rate payload can be, as its shaper counts: 1448 of 1514 bytes of a full packet, behind the headers of
/// Ethernet (14), IPv4 (20) and TCP with time stamps (32). What real Ethernet adds, a preamble, a checksum and a gap of 24
/// bytes, is not in the shaper's rate.
pub(super) const MOST_SHARE_OF_LINK: f64 = 1448.0 / 1514.0;

/// How the network is kept from being overrun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Cc {
    /// By TCP alone: whole messages are sent as soon as they are wanted
    None,
    /// The receiver grants portions, for as many bytes as the path holds
    Credit,
    /// Without this library: one thread reads plain sockets, to which senders write; what the machine itself can do
    Plain,
}

/// All, in the order of plots.
pub(super) const ALL: [Cc; 3] = [Cc::None, Cc::Credit, Cc::Plain];

impl Cc {
    /// Its name, as it is given.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Credit => "credit",
            Self::Plain => "plain",
        }
    }
}

/// What the switch saw on its port to the receiver.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Switch {
    /// Packets that did not fit the buffer.
    pub(super) dropped: u64,
    pub(super) queue_p50_bytes: f64,
    pub(super) queue_p99_bytes: f64,
}

impl Switch {
    /// Reads what `netns-cluster --stats` wrote.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let number = |line: &str, name: &str| line.strip_prefix(name)?.split(' ').next()?.parse::<f64>().ok();
        let queue = sorted(text.lines().filter_map(|line| number(line, "queue ")).collect());
        let dropped = text.lines().find_map(|line| number(line, "dropped "))?;
        Some(Self {
            dropped: dropped as u64,
            queue_p50_bytes: percentile(&queue, 50),
            queue_p99_bytes: percentile(&queue, 99),
        })
    }
}

/// One sender's part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct SenderRow {
    pub(super) rank: usize,
    pub(super) goodput_gb_per_s: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) retransmits: u64,
}

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) host: String,
    pub(super) wire: Way,
    pub(super) shape: Option<Shape>,
    pub(super) cc: Cc,
    /// The senders and the receiver.
    pub(super) ranks: usize,
    pub(super) senders: usize,
    pub(super) dtype: &'static str,
    pub(super) bytes: usize,
    pub(super) depth: usize,
    /// What all senders together push from.
    pub(super) source_bytes: usize,
    pub(super) seconds: f64,
    pub(super) pushes: f64,
    pub(super) goodput_gb_per_s: f64,
    /// Payload, of the link's rate; and how much of that it can be.
    pub(super) share_of_link: Option<f64>,
    pub(super) most_share_of_link: Option<f64>,
    pub(super) jain: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) segments: u64,
    pub(super) retransmits: u64,
    pub(super) switch: Option<Switch>,
    pub(super) refused: Option<Refused>,
    pub(super) per_sender: Vec<SenderRow>,
}

/// Least goodput beside the best number of senders, least fairness, and least part of an equal share: below, a sender starves.
const LEAST_OF_BEST: f64 = 0.95;
const LEAST_JAIN: f64 = 0.98;
const LEAST_OF_SHARE: f64 = 0.5;

/// Says of each way of control whether goodput and fairness hold as senders grow in number, and where they do not; of rows
/// with two senders or more, and only where there are several numbers of them.
pub(super) fn judge(rows: &[Row]) -> Vec<String> {
    let mut verdicts = Vec::new();
    for cc in ALL {
        let many: Vec<&Row> = rows.iter().filter(|row| row.cc == cc && row.senders >= 2).collect();
        if many.len() < 2 {
            continue;
        }
        let best = many.iter().map(|row| row.goodput_gb_per_s).fold(0.0, f64::max);
        let (mut missed, mut held) = (Vec::new(), 0);
        for row in &many {
            let of_best = row.goodput_gb_per_s / best;
            let share = row.goodput_gb_per_s / row.senders as f64;
            let slowest = row.per_sender.iter().map(|one| one.goodput_gb_per_s / share).fold(f64::INFINITY, f64::min);
            if of_best >= LEAST_OF_BEST && row.jain >= LEAST_JAIN && slowest >= LEAST_OF_SHARE {
                held += 1;
            } else {
                let senders = row.senders;
                missed.push(format!("{senders}: {of_best:.2} of the best, Jain {:.4}, slowest {slowest:.2}", row.jain));
            }
        }
        let end = if missed.is_empty() { String::new() } else { format!("; missed at {}", missed.join("; ")) };
        verdicts.push(format!(
            "bar, {}: goodput >= {LEAST_OF_BEST} of the best, Jain >= {LEAST_JAIN}, slowest >= {LEAST_OF_SHARE} of its share: \
             held by {held} of {} rows{end}",
            cc.name(),
            many.len()
        ));
    }
    verdicts.extend([Cc::None, Cc::Credit].into_iter().filter_map(|cc| beside_plain(rows, cc)));
    verdicts
}

/// Goodput beside that of plain sockets, for each number of senders.
fn beside_plain(rows: &[Row], cc: Cc) -> Option<String> {
    let of = |row: &Row| {
        let plain = rows.iter().find(|other| other.cc == Cc::Plain && other.senders == row.senders)?;
        Some(format!("{}: {:.2}", row.senders, row.goodput_gb_per_s / plain.goodput_gb_per_s))
    };
    let all: Vec<String> = rows.iter().filter(|row| row.cc == cc).filter_map(of).collect();
    (!all.is_empty()).then(|| format!("{} beside plain sockets, by senders: {}", cc.name(), all.join(", ")))
}

/// What is the same for all rows of a run.
pub(super) struct About {
    pub(super) host: String,
    pub(super) wire: Way,
    pub(super) shape: Option<Shape>,
    pub(super) bytes: usize,
    pub(super) depth: usize,
    pub(super) source: usize,
}

/// Buffers of `bytes` that each of `senders` pushes from, `depth` at once at most: its share of `source`.
pub(super) fn buffers((bytes, depth): (usize, usize), source: usize, senders: u32) -> usize {
    (source / senders as usize / bytes).max(depth)
}

impl Row {
    pub(super) fn new(about: &About, cc: Cc, taken: &Taken, pushed: Vec<Pushed>, switch: Option<Switch>) -> Self {
        let rate = |pushes: f64| pushes * about.bytes as f64 / taken.seconds / 1e9;
        let rates: Vec<f64> = taken.pushes.iter().map(|pushes| rate(*pushes)).collect();
        let total = rates.iter().sum();
        let (mut all, mut per_sender) = (Vec::new(), Vec::new());
        let (mut segments, mut retransmits) = (0, 0);
        for (at, one) in pushed.into_iter().enumerate() {
            segments += one.sent.segments;
            retransmits += one.sent.retransmits;
            let times = sorted(one.push_us);
            per_sender.push(SenderRow {
                rank: at + 1,
                goodput_gb_per_s: rates[at],
                p50_us: percentile(&times, 50),
                p99_us: percentile(&times, 99),
                retransmits: one.sent.retransmits,
            });
            all.extend(times);
        }
        let all = sorted(all);
        Self {
            host: about.host.clone(),
            wire: about.wire,
            shape: about.shape.clone(),
            cc,
            ranks: rates.len() + 1,
            senders: rates.len(),
            dtype: "bytes",
            bytes: about.bytes,
            depth: about.depth,
            source_bytes: buffers((about.bytes, about.depth), about.source, rates.len() as u32)
                * about.bytes
                * rates.len(),
            seconds: taken.seconds,
            pushes: taken.pushes.iter().sum(),
            goodput_gb_per_s: total,
            share_of_link: about.shape.as_ref().map(|shape| total / shape.gb_per_s),
            most_share_of_link: about.shape.as_ref().map(|_| MOST_SHARE_OF_LINK),
            jain: jain(&rates),
            p50_us: percentile(&all, 50),
            p99_us: percentile(&all, 99),
            segments,
            retransmits,
            switch,
            refused: taken.refused.filter(|_| about.wire == Way::Verbs),
            per_sender,
        }
    }

    /// The head of the table that people read.
    pub(super) fn head() -> String {
        format!(
            "{:>7} {:>7} {:>12} {:>8} {:>7} {:>17} {:>11} {:>11} {:>11} {:>8} {:>15} {:>9}",
            "senders",
            "cc",
            "goodput GB/s",
            "of link",
            "Jain",
            "slowest..fastest",
            "p50 us",
            "p99 us",
            "retransmits",
            "dropped",
            "queue KB 50/99",
            "not ready"
        )
    }

    /// The row for people.
    pub(super) fn line(&self) -> String {
        let rates = sorted(self.per_sender.iter().map(|one| one.goodput_gb_per_s).collect());
        let spread = format!("{:.4}..{:.4}", rates.first().unwrap_or(&0.0), rates.last().unwrap_or(&0.0));
        let share = self.share_of_link.map_or("-".to_owned(), |share| format!("{:.1} %", share * 100.0));
        let (dropped, queue) = self.switch.as_ref().map_or(("-".to_owned(), "-".to_owned()), |switch| {
            let queue = format!("{:.0}/{:.0}", switch.queue_p50_bytes / 1e3, switch.queue_p99_bytes / 1e3);
            (switch.dropped.to_string(), queue)
        });
        let not_ready = self.refused.map_or("-".to_owned(), |refused| refused.not_ready.to_string());
        format!(
            "{:>7} {:>7} {:>12.4} {share:>8} {:>7.4} {spread:>17} {:>11.0} {:>11.0} {:>11} {dropped:>8} {queue:>15} {not_ready:>9}",
            self.senders,
            self.cc.name(),
            self.goodput_gb_per_s,
            self.jain,
            self.p50_us,
            self.p99_us,
            self.retransmits
        )
    }

    /// A sender's line for people.
    pub(super) fn sender_lines(&self) -> impl Iterator<Item = String> {
        self.per_sender.iter().map(|one| {
            format!(
                "{:>7} {:>7} {:>12.4} {:>8} {:>7} {:>17} {:>11.0} {:>11.0} {:>11}",
                format!("#{}", one.rank),
                "",
                one.goodput_gb_per_s,
                "",
                "",
                "",
                one.p50_us,
                one.p99_us,
                one.retransmits
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sockets::Sent;

    #[test]
    fn a_row_adds_up_what_the_members_saw() {
        let shape: Shape = "8gbit:64kb".parse().unwrap();
        assert_eq!((shape.gb_per_s, shape.buffer.as_str()), (1.0, "64kb"));
        let about = About {
            host: "h".into(),
            wire: Way::Tcp,
            shape: Some(shape),
            bytes: 1_000_000,
            depth: 2,
            source: 7_900_000,
        };
        let taken = Taken { seconds: 2.0, pushes: vec![1000.0, 500.0], refused: None };
        let one = |us: f64| Pushed { push_us: vec![us; 10], sent: Sent { segments: 100, retransmits: us as u64 } };
        let row = Row::new(
            &about,
            Cc::None,
            &taken,
            vec![one(3.0), one(5.0)],
            Switch::parse("queue 10\nqueue 30\ndropped 7\n"),
        );
        assert_eq!((row.goodput_gb_per_s, row.share_of_link), (0.75, Some(0.75)));
        assert_eq!((row.jain, row.retransmits, row.segments, row.pushes), (0.9, 8, 200, 1500.0));
        assert_eq!((row.p50_us, row.p99_us, row.per_sender[1].p50_us), (3.0, 5.0, 5.0));
        assert_eq!(row.source_bytes, 6_000_000, "three whole buffers each");
        assert_eq!(
            Row::new(&About { source: 0, ..about }, Cc::None, &taken, vec![one(3.0); 2], None).source_bytes,
            4_000_000
        );
        assert_eq!(row.switch, Some(Switch { dropped: 7, queue_p50_bytes: 10.0, queue_p99_bytes: 30.0 }));
    }

    #[test]
    fn the_bar_is_missed_by_less_goodput_by_unfairness_and_by_a_starved_sender() {
        let about = About { host: "h".into(), wire: Way::Tcp, shape: None, bytes: 1_000_000, depth: 2, source: 0 };
        let row = |pushes: &[f64]| {
            let taken = Taken { seconds: 1.0, pushes: pushes.to_vec(), refused: None };
            let none = Pushed { push_us: vec![1.0], sent: Sent::default() };
            Row::new(&about, Cc::None, &taken, vec![none; pushes.len()], None)
        };
        let verdict = |other: &[f64]| judge(&[row(&[500.0, 500.0]), row(other)]).concat();
        assert!(verdict(&[480.0, 480.0]).ends_with("held by 2 of 2 rows"));
        assert!(
            verdict(&[470.0, 470.0])
                .ends_with("held by 1 of 2 rows; missed at 2: 0.94 of the best, Jain 1.0000, slowest 1.00")
        );
        assert!(verdict(&[600.0, 400.0]).contains("missed at 2: 1.00 of the best, Jain 0.9615"));
        let mut starved = vec![15.0; 64];
        starved[0] = 5.0;
        assert!(verdict(&starved).contains("missed at 64: 0.95 of the best, Jain 0.9931, slowest 0.34"));
        assert!(judge(&[row(&[1000.0]), row(&[1.0, 1.0])]).is_empty(), "one number of senders has nothing beside it");
        let plain = |pushes: &[f64]| Row { cc: Cc::Plain, ..row(pushes) };
        let verdicts = judge(&[row(&[500.0, 500.0]), plain(&[400.0, 400.0]), row(&[1000.0])]);
        assert_eq!(verdicts, ["none beside plain sockets, by senders: 2: 1.25"]);
    }

    #[test]
    fn what_is_no_shape_is_refused() {
        for wrong in ["", "1gbit", "1gbit:", "gbit:1kb", "-1gbit:1kb", "1parsec:1kb"] {
            assert!(wrong.parse::<Shape>().is_err(), "{wrong}");
        }
    }
}
