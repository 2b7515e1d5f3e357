//! Does: gives every decoder what it takes, and thousands of changes of it: none panics, and none takes memory on trust.

use gradwire_fuzz::{Mutation, crates, read, seeds};
use gradwire_transport::decoders::Decoder;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Changed messages that each decoder is given: fewer where whole shards are made of each, so that all of it takes seconds.
fn inputs(decoder: &Decoder) -> u64 {
    if decoder.most.0 < 1 << 20 { 20_000 } else { 6_000 }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads, and holds the decoder to the memory that it says it takes; what is wrong.
fn watched(decoder: &Decoder, input: &[u8], origin: &str) -> Result<(), String> {
    let mut taken = None;
    let read = || taken = Some(allocation_counter::measure(|| (decoder.decode)(input)).bytes_max);
    let whole = catch_unwind(AssertUnwindSafe(read)).is_ok();
    let (taken, (base, each)) = (taken.unwrap_or(0), decoder.most);
    let most = base + each * input.len() as u64;
    if whole && taken <= most {
        return Ok(());
    }
    let what = if whole { format!("took {taken} bytes, of at most {most}") } else { "panicked".to_owned() };
    Err(format!("{} {what} at {origin}: {}", decoder.name, hex(input)))
}

/// The first thing that is wrong with each decoder is told, for all of them.
fn judge(check: impl Fn(&Decoder) -> Result<(), String>) {
    let wrong: Vec<String> = all().filter_map(|decoder| check(&decoder).err()).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn all() -> impl Iterator<Item = Decoder> {
    crates().into_iter().flat_map(|(_, decoders)| decoders)
}

#[test]
fn what_is_right_is_read_and_no_change_of_it_panics_or_takes_memory_on_trust() {
    judge(|decoder| {
        let samples = (decoder.samples)();
        for (n, sample) in samples.iter().enumerate() {
            let mut sealed = sample.clone();
            (decoder.seal)(&mut sealed);
            assert_eq!(&sealed, sample, "{}: a right checksum was changed", decoder.name);
            watched(decoder, sample, &format!("sample {n}"))?;
        }
        (0..inputs(decoder)).try_for_each(|seed| {
            let mut mutation = Mutation::new(seed);
            let mut input = mutation.of(&samples);
            // Half of them reach what lies behind the checksums.
            if mutation.below(2) == 0 {
                (decoder.seal)(&mut input);
            }
            watched(decoder, &input, &format!("seed {seed}"))
        })
    });
}

#[test]
fn every_byte_that_is_missing_is_noticed_without_a_panic() {
    judge(|decoder| {
        let samples = (decoder.samples)();
        let mut short = samples.iter().filter(|sample| sample.len() < 1000);
        short.try_for_each(|sample| {
            (0..sample.len()).try_for_each(|end| watched(decoder, &sample[..end], "a cut sample"))
        })
    });
}

#[test]
fn the_seeds_of_libfuzzer_reach_every_decoder() {
    for (name, decoders) in crates() {
        let seeds = seeds(&decoders);
        assert!((0..decoders.len()).all(|n| seeds.iter().any(|seed| usize::from(seed[0] / 2) == n)), "{name}");
        seeds.iter().for_each(|seed| read(&decoders, seed));
    }
}
