#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmemd::fuzz::checkpoint_sealed(data));
