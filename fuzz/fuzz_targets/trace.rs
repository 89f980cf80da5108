#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmemd_bench::fuzz::trace(data));
