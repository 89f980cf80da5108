#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmemd::fuzz::control_line(data));
