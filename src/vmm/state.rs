//! The saved state of a machine: everything that is not in its memory. `docs/guest.md` has it byte by byte.

use crate::vmm::bytes::{Reader, Writer, checksum};
use crate::vmm::config::MachineConfig;
use crate::vmm::counters::Saved;
use crate::vmm::error::VmmError;
use crate::vmm::limits::VCPUS_MAX;
use crate::vmm::vcpu_state::VcpuState;

const MAGIC: &[u8; 8] = b"VMEMDVM\0";
const VERSION: u32 = 1;
/// Bytes before the first field that another version may change: magic, version, length.
const HEAD_BYTES: usize = 16;
const SUM_BYTES: usize = 8;
/// A longer text than this is no workload.
const WORKLOAD_BYTES_MAX: usize = 1024;

pub(super) struct MachineState {
    pub(super) config: MachineConfig,
    pub(super) counters: Saved,
    pub(super) vcpus: Vec<VcpuState>,
}

impl MachineState {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut body = Writer::default();
        body.u64(self.config.memory_bytes);
        body.u32(self.config.vcpus);
        body.block(self.config.workload.to_string().as_bytes());
        self.counters.iter().for_each(|counter| body.u64(*counter));
        self.vcpus.iter().for_each(|vcpu| vcpu.write(&mut body));
        sealed(&body.into_bytes())
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<MachineState, VmmError> {
        let mut head = Reader::new(bytes);
        if head.raw(MAGIC.len()).is_ok_and(|magic| magic != MAGIC) {
            return Err(VmmError::BadState("it is not the state of a vmemd guest"));
        }
        let version = head.u32()?;
        if version != VERSION {
            return Err(VmmError::StateVersion { found: version, known: VERSION });
        }
        let length = head.u32()? as usize;
        if length != bytes.len() || length < HEAD_BYTES + SUM_BYTES {
            return Err(VmmError::BadState("its length is not what it says"));
        }
        let (summed, sum) = bytes.split_at(length - SUM_BYTES);
        if Reader::new(sum).u64()? != checksum(summed) {
            return Err(VmmError::BadState("its checksum is wrong"));
        }
        decode_body(&mut Reader::new(&summed[HEAD_BYTES..]))
    }
}

/// A body with what goes around it.
pub(crate) fn sealed(body: &[u8]) -> Vec<u8> {
    let mut out = Writer::default();
    out.raw(MAGIC);
    out.u32(VERSION);
    out.u32((HEAD_BYTES + body.len() + SUM_BYTES) as u32);
    out.raw(body);
    out.finish()
}

fn decode_body(input: &mut Reader<'_>) -> Result<MachineState, VmmError> {
    let memory_bytes = input.u64()?;
    let vcpus = input.u32()?;
    if !(1..=VCPUS_MAX).contains(&vcpus) {
        return Err(VmmError::Vcpus(vcpus));
    }
    let text = input.block()?;
    let text = std::str::from_utf8(text).ok().filter(|text| text.len() <= WORKLOAD_BYTES_MAX);
    let workload = text.ok_or(VmmError::BadState("its workload is not a text"))?.parse()?;
    let mut counters: Saved = Default::default();
    for counter in &mut counters {
        *counter = input.u64()?;
    }
    let vcpu_states = (0..vcpus).map(|_| VcpuState::read(input)).collect::<Result<Vec<_>, _>>()?;
    if !input.is_empty() {
        return Err(VmmError::BadState("it has more bytes than fields"));
    }
    let config = MachineConfig { memory_bytes, vcpus, workload };
    Ok(MachineState { config, counters, vcpus: vcpu_states })
}

/// The configuration in a saved state, to know how much memory it needs.
pub fn saved_config(state: &[u8]) -> Result<MachineConfig, VmmError> {
    MachineState::decode(state).map(|state| state.config)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without_vcpus(workload: &str, vcpus: u32) -> Vec<u8> {
        let config = MachineConfig { memory_bytes: 64 << 20, vcpus, workload: workload.parse().unwrap() };
        MachineState { config, counters: [7; 12], vcpus: Vec::new() }.encode()
    }

    fn error(bytes: &[u8]) -> String {
        MachineState::decode(bytes).err().expect("no such state").to_string()
    }

    #[test]
    fn refuses_every_truncation_and_every_flipped_byte() {
        let good = without_vcpus("rewrite", 1);
        for bytes in 0..good.len() {
            error(&good[..bytes]);
            let mut bad = good.clone();
            bad[bytes] ^= 0x10;
            error(&bad);
        }
    }

    #[test]
    fn says_what_is_wrong() {
        let mut state = without_vcpus("rewrite", 1);
        assert!(error(&state).contains("ends too early"));
        assert!(error(&without_vcpus("rewrite", 9)).contains("9 vCPUs"));
        state[8] = 2;
        assert!(error(&state).contains("version 2, this vmemd knows 1"));
        state[0] = b'X';
        assert!(error(&state).contains("not the state of a vmemd guest"));
        assert!(error(b"").contains("ends too early"));
    }
}
