//! Feeds every decoder of gradwire what nobody should send.
//!
//! A bounded run of it is a test, `cargo test -p gradwire-fuzz`. For as long as one likes, by libFuzzer, on nightly Rust:
//!
//! ```sh
//! cargo install cargo-fuzz
//! cargo run -p gradwire-fuzz --bin seeds fuzz/corpus
//! cargo +nightly fuzz run --features libfuzzer ps fuzz/corpus/ps -- -max_len=65536    # or transport, or collectives
//! ```

mod mutation;

pub use mutation::Mutation;

use gradwire_transport::decoders::Decoder;

/// The crates whose decoders there are, with those.
pub fn crates() -> [(&'static str, Vec<Decoder>); 3] {
    [
        ("transport", gradwire_transport::decoders::all()),
        ("collectives", gradwire_collectives::decoders::all()),
        ("ps", gradwire_ps::decoders::all()),
    ]
}

/// Reads an input of libFuzzer: which decoder, and whether checksums are put right, are in its first byte.
pub fn read(decoders: &[Decoder], input: &[u8]) {
    let Some((&first, bytes)) = input.split_first() else { return };
    let Some(decoder) = decoders.get(usize::from(first / 2)) else { return };
    let mut bytes = bytes.to_vec();
    if first % 2 == 1 {
        (decoder.seal)(&mut bytes);
    }
    (decoder.decode)(&bytes);
}

/// Inputs for [`read`] to begin with.
pub fn seeds(decoders: &[Decoder]) -> Vec<Vec<u8>> {
    let of = |(first, decoder): (u8, &Decoder)| {
        (decoder.samples)().into_iter().map(move |sample| [&[2 * first + 1], &sample[..]].concat())
    };
    (0..).zip(decoders).flat_map(of).collect()
}
