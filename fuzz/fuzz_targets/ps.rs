//! Does: hands libFuzzer's inputs to the decoders of `ps`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| gradwire_fuzz::read(&gradwire_ps::decoders::all(), input));
