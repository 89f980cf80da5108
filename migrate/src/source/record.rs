//! A record of pages: a reader's buffer, whose head room takes the record's header and metadata, so that all of it
//! leaves in one write.
//!
//! ```text
//!   0        HEAD - header - meta          HEAD                         HEAD + pages x 4096
//!   ├─ unused ─┼─ header, runs, checksums ─┼─ content of the pages ────────────┤
//! ```

use std::rc::Rc;

use crate::reader::{MAX_RUNS, PageBuffer};
use crate::region::{Pages, Region};
use crate::wire::extents;
use crate::wire::record::{
    HEADER_BYTES, Header, MAX_DATA_META, MAX_RECORD_PAGES, MAX_RECORD_RUNS, RecordKind, Sequence,
};

const _: () = assert!(MAX_RUNS <= MAX_RECORD_RUNS);

/// An empty buffer with the room that a record needs.
pub(crate) fn empty() -> PageBuffer {
    PageBuffer::new(HEADER_BYTES + MAX_DATA_META, MAX_RECORD_PAGES)
}

/// Makes a record of the buffer: the bytes to send. The buffer must stay as it is until they are sent.
pub(crate) fn seal(buffer: &mut PageBuffer, sequence: &mut Sequence) -> Region<Rc<Pages>> {
    let meta_bytes = 8 * (buffer.runs().len() + buffer.sums().len());
    let header = Header {
        kind: RecordKind::Pages,
        flags: 0,
        pages: buffer.pages(),
        number: buffer.runs().len() as u64,
        meta_bytes: meta_bytes as u32,
        payload_bytes: buffer.pages() << swapd::PAGE_SHIFT,
    };
    let (head, runs, sums) = buffer.head_room(HEADER_BYTES + meta_bytes);
    let (header_bytes, meta) = head.split_at_mut(HEADER_BYTES);
    let words = runs.iter().map(|run| extents::encode(*run));
    let words = words.chain(sums.iter().map(|sum| sum.to_le_bytes()));
    meta.as_chunks_mut().0.iter_mut().zip(words).for_each(|(into, word)| *into = word);
    header_bytes.copy_from_slice(&header.seal(meta, sequence));
    buffer.whole(HEADER_BYTES + meta_bytes)
}

#[cfg(test)]
mod tests {
    use swapd::{PAGE_SIZE, PageNo, Run};

    use super::*;
    use crate::session::SessionId;
    use crate::wire::extents::Bounds;
    use crate::wire::record::Lane;

    #[test]
    fn a_record_is_header_runs_sums_and_content_in_one_piece() {
        let sequence = || Sequence::new(SessionId([1; 16]), Lane::Stream(0));
        let mut record = empty();
        for (page, byte) in [(5, 1), (6, 2), (9, 3)] {
            let page = PageNo(page);
            // SAFETY: the array is a page.
            unsafe { record.copy(page, [byte; PAGE_SIZE].as_ptr()) };
            record.keep(page, u64::from(byte));
        }
        let region = seal(&mut record, &mut sequence());
        let (head, rest) = region.bytes().split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::open(head).unwrap();
        let (meta, content) = rest.split_at(header.meta_bytes as usize);
        Header::verify(head, meta, &mut sequence()).unwrap();
        let mut runs = Vec::new();
        let bounds = Bounds { memory_pages: 512, stream: 0, streams: 1 };
        bounds.decode(&meta[..16], 3, &mut runs).unwrap();
        assert_eq!(runs, [Run::new(PageNo(5), 2), Run::one(PageNo(9))]);
        assert_eq!(meta[16..24], 1_u64.to_le_bytes());
        assert_eq!(content.len(), 3 * PAGE_SIZE);
        assert_eq!(content[2 * PAGE_SIZE], 3);
    }
}
