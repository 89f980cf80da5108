//! The guest program: what a vCPU executes, all of it in ring 3.
//!
//! It is position-independent and gets copied into guest memory; all it knows is the address of its vCPU's block
//! (r15), and all its state is in that block, in registers and in the ledger, so it can be stopped and moved
//! between any two instructions. It talks to the host by `out` of 32 bits to the ports below.
//!
//! ```text
//! start ─▶ fill own share ─▶ fill own part of the rest ─▶ in order ─┬─▶ touch a page: verify, rewrite ─┐
//!                                                         random  ──┤      ▲        every batch: PROGRESS│
//!                                                         zipf    ──┘      └─────────── every round: ROUND┘
//!                                                         idle: IDLE for ever
//! ```
//! Registers: r15 block, r14 ledger, r13 pages left in the batch, r12 pages left in the round, rbx page number,
//! r8d its generation; rax, rcx, rdx, rdi, xmm0-xmm9 scratch.

use std::arch::global_asm;

use crate::vmm::content::{MIX_1, MIX_2, STEP};
use crate::vmm::zipf::BUCKET_BITS;

/// Pages verified (and rewritten, if the workload writes) since the last report.
pub(super) const PORT_PROGRESS: u16 = 0x510;
/// Pages filled since the last report.
pub(super) const PORT_FILLED: u16 = 0x514;
/// A round is complete.
pub(super) const PORT_ROUND: u16 = 0x518;
/// The number of a page that had the wrong content.
pub(super) const PORT_MISMATCH: u16 = 0x51c;
/// Nothing to do: wait.
pub(super) const PORT_IDLE: u16 = 0x520;
/// One more than the last byte of the ports.
pub(super) const PORTS_END: u16 = 0x524;

/// Values of [`block::MODE`].
pub(super) mod mode {
    pub(crate) const IDLE: u64 = 0;
    pub(crate) const IN_ORDER: u64 = 1;
    pub(crate) const RANDOM: u64 = 2;
    pub(crate) const ZIPF: u64 = 3;
}

/// Bits of [`block::FLAGS`].
pub(super) mod flag {
    /// Verify only.
    pub(crate) const READ_ONLY: u64 = 1;
    /// The working set was filled: a generation of 0 means that the ledger was lost.
    pub(crate) const FILLED: u64 = 2;
}

/// Offsets of 64-bit fields in a vCPU's block.
pub(super) mod block {
    pub(crate) const LEDGER: u64 = 0x00;
    pub(crate) const MODE: u64 = 0x08;
    pub(crate) const FLAGS: u64 = 0x10;
    pub(crate) const BATCH: u64 = 0x18;
    pub(crate) const SHARE_FIRST: u64 = 0x20;
    pub(crate) const SHARE_PAGES: u64 = 0x28;
    /// Pages of the share to fill: all or none.
    pub(crate) const SHARE_FILL: u64 = 0x30;
    pub(crate) const REST_FIRST: u64 = 0x38;
    /// Pages of the rest to fill.
    pub(crate) const REST_FILL: u64 = 0x40;
    pub(crate) const RANDOM: u64 = 0x48;
    pub(crate) const ZIPF_TABLE: u64 = 0x50;
    /// Scattering of ranks: the power of two that holds the share, less one, and half its bits.
    pub(crate) const SCATTER_MASK: u64 = 0x58;
    pub(crate) const SCATTER_SHIFT: u64 = 0x60;
    /// In order: touches a round, and from one to the next.
    pub(crate) const ROUND_PAGES: u64 = 0x68;
    pub(crate) const STEP_PAGES: u64 = 0x70;
    /// Where the stack starts downwards: the end of the block.
    pub(crate) const STACK: u64 = 0x1000;
}

/// Knuth's factor for a 64-bit linear congruence (MMIX).
const RANDOM_FACTOR: u64 = 6_364_136_223_846_793_005;
const RANDOM_TERM: u64 = 1_442_695_040_888_963_407;

global_asm!(
    ".pushsection .rodata.vmemd_guest, \"a\"",
    ".balign 64",
    ".globl vmemd_guest_start",
    ".globl vmemd_guest_end",
    "vmemd_guest_start:",
    "    mov r14, [r15 + {LEDGER}]",
    "    mov rbx, [r15 + {SHARE_FIRST}]",
    "    mov r12, [r15 + {SHARE_FILL}]",
    "    call 20f",
    "    mov rbx, [r15 + {REST_FIRST}]",
    "    mov r12, [r15 + {REST_FILL}]",
    "    call 20f",
    "    mov r13, [r15 + {BATCH}]",
    "    mov rax, [r15 + {MODE}]",
    "    cmp rax, {IN_ORDER}",
    "    je 2f",
    "    cmp rax, {RANDOM_MODE}",
    "    je 4f",
    "    cmp rax, {ZIPF}",
    "    je 6f",
    "    mov edx, {PORT_IDLE}",
    "    xor eax, eax",
    "3:  out dx, eax",
    "    jmp 3b",
    // Rounds in order.
    "2:  mov rbx, [r15 + {SHARE_FIRST}]",
    "    mov r12, [r15 + {ROUND_PAGES}]",
    "3:  call 30f",
    "    add rbx, [r15 + {STEP_PAGES}]",
    "    dec r12",
    "    jnz 3b",
    "    call 15f",
    "    jmp 2b",
    // Rounds at random.
    "4:  mov r12, [r15 + {SHARE_PAGES}]",
    "5:  call 12f",
    "    mul qword ptr [r15 + {SHARE_PAGES}]",
    "    mov rbx, rdx",
    "    add rbx, [r15 + {SHARE_FIRST}]",
    "    call 30f",
    "    dec r12",
    "    jnz 5b",
    "    call 15f",
    "    jmp 4b",
    // Rounds by Zipf's law: a bucket by the top bits, a rank within it by the 32 bits below.
    "6:  mov r12, [r15 + {SHARE_PAGES}]",
    "7:  call 12f",
    "    mov rcx, rax",
    "    shr rcx, 64 - {BUCKET_BITS}",
    "    mov rdi, [r15 + {ZIPF_TABLE}]",
    "    lea rdi, [rdi + rcx * 4]",
    "    mov ecx, [rdi + 4]",
    "    mov edi, [rdi]",
    "    sub ecx, edi",
    "    shr rax, 32 - {BUCKET_BITS}",
    "    mov eax, eax",
    "    imul rax, rcx",
    "    shr rax, 32",
    "    add rax, rdi",
    // Scatter the rank: a permutation of the next power of two, again until it falls into the share.
    "    mov rcx, [r15 + {SCATTER_SHIFT}]",
    "    movabs rdi, {RANDOM_FACTOR}",
    "8:  imul rax, rdi",
    "    add rax, 0x2545f491",
    "    and rax, [r15 + {SCATTER_MASK}]",
    "    mov rdx, rax",
    "    shr rdx, cl",
    "    xor rax, rdx",
    "    imul rax, rdi",
    "    and rax, [r15 + {SCATTER_MASK}]",
    "    mov rdx, rax",
    "    shr rdx, cl",
    "    xor rax, rdx",
    "    cmp rax, [r15 + {SHARE_PAGES}]",
    "    jae 8b",
    "    mov rbx, rax",
    "    add rbx, [r15 + {SHARE_FIRST}]",
    "    call 30f",
    "    dec r12",
    "    jnz 7b",
    "    call 15f",
    "    jmp 6b",
    // Next random number: rax.
    "12: mov rax, [r15 + {RANDOM}]",
    "    movabs rcx, {RANDOM_FACTOR}",
    "    imul rax, rcx",
    "    movabs rcx, {RANDOM_TERM}",
    "    add rax, rcx",
    "    mov [r15 + {RANDOM}], rax",
    "    ret",
    // End of a round: report what is not reported, then the round.
    "15: call 16f",
    "    mov edx, {PORT_ROUND}",
    "    mov eax, 1",
    "    out dx, eax",
    "    ret",
    "16: mov edx, {PORT_PROGRESS}",
    // Report the pages of the batch to port dx and begin the next batch.
    "17: mov rax, [r15 + {BATCH}]",
    "    sub rax, r13",
    "    jz 18f",
    "    out dx, eax",
    "    mov r13, [r15 + {BATCH}]",
    "18: ret",
    // Fill r12 pages from rbx.
    "20: mov r13, [r15 + {BATCH}]",
    "21: test r12, r12",
    "    jz 22f",
    "    mov r8d, 1",
    "    call 50f",
    "    inc rbx",
    "    dec r12",
    "    dec r13",
    "    jnz 21b",
    "    mov edx, {PORT_FILLED}",
    "    call 17b",
    "    jmp 21b",
    "22: mov edx, {PORT_FILLED}",
    "    jmp 17b",
    // Touch page rbx: verify it against the ledger, write it anew.
    "30: mov r8d, [r14 + rbx * 4]",
    "    test r8d, r8d",
    "    jz 35f",
    "    call 40f",
    "31: mov rdi, rbx",
    "    shl rdi, 12",
    "    lea rax, [rdi + 4096]",
    "    pxor xmm5, xmm5",
    "    .balign 16, 0x90",
    "32: movdqa xmm6, [rdi]",
    "    movdqa xmm7, [rdi + 16]",
    "    movdqa xmm8, [rdi + 32]",
    "    movdqa xmm9, [rdi + 48]",
    "    pxor xmm6, xmm0",
    "    pxor xmm7, xmm1",
    "    pxor xmm8, xmm2",
    "    pxor xmm9, xmm3",
    "    por xmm6, xmm7",
    "    por xmm8, xmm9",
    "    por xmm5, xmm6",
    "    por xmm5, xmm8",
    "    paddq xmm0, xmm4",
    "    paddq xmm1, xmm4",
    "    paddq xmm2, xmm4",
    "    paddq xmm3, xmm4",
    "    add rdi, 64",
    "    cmp rdi, rax",
    "    jne 32b",
    "    pxor xmm6, xmm6",
    "    pcmpeqd xmm5, xmm6",
    "    pmovmskb eax, xmm5",
    "    cmp eax, 0xffff",
    "    jne 37f",
    "    test byte ptr [r15 + {FLAGS}], {READ_ONLY}",
    "    jnz 33f",
    "    inc r8d",
    "    call 50f",
    "33: dec r13",
    "    jz 16b",
    "    ret",
    // Never written: zeros, unless all was filled.
    "35: test byte ptr [r15 + {FLAGS}], {FILLED}",
    "    jnz 37f",
    "    pxor xmm0, xmm0",
    "    pxor xmm1, xmm1",
    "    pxor xmm2, xmm2",
    "    pxor xmm3, xmm3",
    "    pxor xmm4, xmm4",
    "    jmp 31b",
    // Wrong content: report it, start the page anew.
    "37: mov edx, {PORT_MISMATCH}",
    "    mov eax, ebx",
    "    out dx, eax",
    "    inc r8d",
    "    jmp 50f",
    // Words 0-7 of page rbx in generation r8d: xmm0-xmm3; xmm4: eight steps.
    "40: mov eax, r8d",
    "    shl rax, 32",
    "    or rax, rbx",
    "    mov rdx, rax",
    "    shr rdx, 30",
    "    xor rax, rdx",
    "    movabs rdx, {MIX_1}",
    "    imul rax, rdx",
    "    mov rdx, rax",
    "    shr rdx, 27",
    "    xor rax, rdx",
    "    movabs rdx, {MIX_2}",
    "    imul rax, rdx",
    "    mov rdx, rax",
    "    shr rdx, 31",
    "    xor rax, rdx",
    "    movq xmm0, rax",
    "    punpcklqdq xmm0, xmm0",
    "    movdqa xmm1, xmm0",
    "    movdqa xmm2, xmm0",
    "    movdqa xmm3, xmm0",
    "    paddq xmm0, [rip + 60f]",
    "    paddq xmm1, [rip + 61f]",
    "    paddq xmm2, [rip + 62f]",
    "    paddq xmm3, [rip + 63f]",
    "    movdqa xmm4, [rip + 64f]",
    "    ret",
    // Write page rbx in generation r8d, then its ledger entry. Generation 0 is never written.
    "50: test r8d, r8d",
    "    jnz 51f",
    "    inc r8d",
    "51: call 40b",
    "    mov rdi, rbx",
    "    shl rdi, 12",
    "    lea rax, [rdi + 4096]",
    "    .balign 16, 0x90",
    "52: movdqa [rdi], xmm0",
    "    movdqa [rdi + 16], xmm1",
    "    movdqa [rdi + 32], xmm2",
    "    movdqa [rdi + 48], xmm3",
    "    paddq xmm0, xmm4",
    "    paddq xmm1, xmm4",
    "    paddq xmm2, xmm4",
    "    paddq xmm3, xmm4",
    "    add rdi, 64",
    "    cmp rdi, rax",
    "    jne 52b",
    "    mov [r14 + rbx * 4], r8d",
    "    ret",
    ".balign 16",
    "60: .quad 0, {STEP}",
    "61: .quad {STEP_2}, {STEP_3}",
    "62: .quad {STEP_4}, {STEP_5}",
    "63: .quad {STEP_6}, {STEP_7}",
    "64: .quad {STEP_8}, {STEP_8}",
    "vmemd_guest_end:",
    ".popsection",
    LEDGER = const block::LEDGER,
    MODE = const block::MODE,
    FLAGS = const block::FLAGS,
    BATCH = const block::BATCH,
    SHARE_FIRST = const block::SHARE_FIRST,
    SHARE_PAGES = const block::SHARE_PAGES,
    SHARE_FILL = const block::SHARE_FILL,
    REST_FIRST = const block::REST_FIRST,
    REST_FILL = const block::REST_FILL,
    RANDOM = const block::RANDOM,
    ZIPF_TABLE = const block::ZIPF_TABLE,
    SCATTER_MASK = const block::SCATTER_MASK,
    SCATTER_SHIFT = const block::SCATTER_SHIFT,
    ROUND_PAGES = const block::ROUND_PAGES,
    STEP_PAGES = const block::STEP_PAGES,
    IN_ORDER = const mode::IN_ORDER,
    RANDOM_MODE = const mode::RANDOM,
    ZIPF = const mode::ZIPF,
    READ_ONLY = const flag::READ_ONLY,
    FILLED = const flag::FILLED,
    PORT_PROGRESS = const PORT_PROGRESS,
    PORT_FILLED = const PORT_FILLED,
    PORT_ROUND = const PORT_ROUND,
    PORT_MISMATCH = const PORT_MISMATCH,
    PORT_IDLE = const PORT_IDLE,
    BUCKET_BITS = const BUCKET_BITS,
    RANDOM_FACTOR = const RANDOM_FACTOR,
    RANDOM_TERM = const RANDOM_TERM,
    MIX_1 = const MIX_1,
    MIX_2 = const MIX_2,
    STEP = const STEP,
    STEP_2 = const STEP.wrapping_mul(2),
    STEP_3 = const STEP.wrapping_mul(3),
    STEP_4 = const STEP.wrapping_mul(4),
    STEP_5 = const STEP.wrapping_mul(5),
    STEP_6 = const STEP.wrapping_mul(6),
    STEP_7 = const STEP.wrapping_mul(7),
    STEP_8 = const STEP.wrapping_mul(8),
);

unsafe extern "C" {
    static vmemd_guest_start: u8;
    static vmemd_guest_end: u8;
}

/// The program's bytes; its entry is the first.
pub(super) fn bytes() -> &'static [u8] {
    // SAFETY: both labels are in one read-only section that is part of this program, the end behind the start, with
    // nothing but the assembled bytes between them.
    unsafe {
        let start = &raw const vmemd_guest_start;
        let end = &raw const vmemd_guest_end;
        std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::layout::{BLOCKS, PROGRAM};

    #[test]
    fn fits_its_place() {
        assert!(!bytes().is_empty());
        assert!(PROGRAM + bytes().len() as u64 <= BLOCKS);
    }
}
