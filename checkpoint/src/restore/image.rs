//! A checkpoint's memory: which pages have content, in which layer it is, what is lost.

use swapd::{Adopted, LayerOf, Run};

use crate::archive::Layers;
use crate::format::{FirstFaults, MapBuilder, MapPiece, MemoryMap, PageKind};

/// Pages that are adopted by one request: the engine takes so many without holding up a fault for long.
pub const ADOPT_PAGES: u32 = 1 << 16;

/// The memory of a checkpoint.
#[derive(Clone, Debug)]
pub struct Image {
    map: MemoryMap,
    first_faults: Vec<Run>,
}

impl Image {
    /// Of a checkpoint whose pages are in these layers; and the layer of each, for the engine.
    pub fn of(layers: &Layers) -> (Image, LayerOf) {
        let layer_of = if layers.count() > 1 { LayerOf::PerPage(layers.per_page()) } else { LayerOf::First };
        (Image { map: layers.map().clone(), first_faults: Vec::new() }, layer_of)
    }

    /// Of a memory of one page, which reads as zeros.
    pub fn nothing() -> Image {
        Image { map: MapBuilder::new(1).finish(&[]), first_faults: Vec::new() }
    }

    /// With the order in which its pages came in after an earlier restore. One of another memory is as good as none.
    #[must_use]
    pub fn with_first_faults(self, order: Option<FirstFaults>) -> Image {
        let order = order.filter(|order| order.pages() == self.map.pages());
        Image { first_faults: order.map(|order| order.runs().to_vec()).unwrap_or_default(), ..self }
    }

    /// Pages of the VM.
    pub fn pages(&self) -> u64 {
        self.map.pages()
    }

    /// The order in which pages came in after an earlier restore; empty if that is not known.
    pub fn first_faults(&self) -> &[Run] {
        &self.first_faults
    }

    /// What the engine is to adopt, with the sum of each page's content.
    pub fn adoption(&self) -> impl Iterator<Item = Adopted> {
        let mut parts = self
            .stored()
            .flat_map(|piece| {
                let starts = (0..piece.run.len).step_by(ADOPT_PAGES as usize);
                starts.map(move |skip| {
                    let run = piece.run.part(skip, ADOPT_PAGES.min(piece.run.len - skip));
                    (run, &piece.sums[skip as usize..][..run.len as usize])
                })
            })
            .peekable();
        // Pages beside each other are adopted together, be they in the checkpoint itself or in its base: an image that
        // was saved often is made of very many pieces.
        std::iter::from_fn(move || {
            let (mut run, sums) = parts.next()?;
            let mut sums = sums.to_vec();
            let joins = |run: Run, next: Run| next.start == run.end() && run.len + next.len <= ADOPT_PAGES;
            while let Some((next, more)) = parts.next_if(|(next, _)| joins(run, *next)) {
                run.len += next.len;
                sums.extend_from_slice(more);
            }
            Some(Adopted { run, sums })
        })
    }

    /// Runs without content, ascending.
    pub fn empty_runs(&self) -> impl Iterator<Item = Run> {
        self.map.pieces().filter(|piece| piece.kind == PageKind::Zero).map(|piece| piece.run)
    }

    /// Runs whose content was lost before they were saved, ascending.
    pub fn lost(&self) -> impl Iterator<Item = Run> {
        self.map.pieces().filter(|piece| piece.kind == PageKind::Lost).map(|piece| piece.run)
    }

    /// Pages with content.
    pub fn stored_pages(&self) -> u64 {
        let counts = self.map.counts();
        counts.here + counts.base
    }

    /// Pages without, because it was lost.
    pub fn lost_pages(&self) -> u64 {
        self.map.counts().lost
    }

    /// Pieces with content, ascending.
    pub(crate) fn stored(&self) -> impl Iterator<Item = MapPiece<'_>> {
        self.map.pieces().filter(|piece| piece.kind.has_content())
    }

    /// The same, as runs.
    pub fn stored_runs(&self) -> impl Iterator<Item = Run> {
        self.stored().map(|piece| piece.run)
    }

    /// The parts of a run of the VM's pages that have content, ascending.
    pub(crate) fn stored_in(&self, run: Run) -> impl Iterator<Item = Run> {
        self.map.pieces_in(run).filter(|piece| piece.kind.has_content()).map(|piece| piece.run)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use swapd::PageNo;

    use super::*;

    pub(crate) fn run(start: u64, len: u32) -> Run {
        Run::new(PageNo(start), len)
    }

    /// An image of so many pages, of which these have content.
    pub(crate) fn image(pages: u64, stored: &[Run], heat: &[u8], first_faults: Vec<Run>) -> Image {
        let mut map = MapBuilder::new(pages);
        for run in stored {
            map.set_content(*run, PageKind::Here, &vec![7; run.len as usize]);
        }
        let image = Image { map: map.finish(heat), first_faults: Vec::new() };
        image.with_first_faults(Some(FirstFaults::new(pages, first_faults).unwrap()))
    }

    fn map(kinds: &str) -> MemoryMap {
        let mut map = MapBuilder::new(kinds.len() as u64);
        for (page, kind) in (0..).map(|page| run(page, 1)).zip(kinds.chars()) {
            match kind {
                'h' => map.set_content(page, PageKind::Here, &[page.start.0]),
                'b' => map.set_content(page, PageKind::Base, &[100 + page.start.0]),
                'l' => map.set(page, PageKind::Lost),
                _ => {}
            }
        }
        map.finish(&[])
    }

    #[test]
    fn the_sums_are_those_of_the_newest_map_and_adoptions_are_not_too_long() {
        let image = Image { map: map("h.bb.l"), first_faults: Vec::new() };
        let adopted: Vec<(Run, Vec<u64>)> =
            image.adoption().map(|adopted| (adopted.run, adopted.sums)).collect();
        assert_eq!(adopted, [(run(0, 1), vec![0]), (run(2, 2), vec![102, 103])]);
        assert_eq!(image.lost().collect::<Vec<_>>(), [run(5, 1)]);
        assert_eq!((image.stored_pages(), image.lost_pages()), (3, 1));

        // Of the checkpoint and of its base, by turns.
        let image = Image { map: map("hbhb.bh"), first_faults: Vec::new() };
        let adopted: Vec<(Run, Vec<u64>)> =
            image.adoption().map(|adopted| (adopted.run, adopted.sums)).collect();
        assert_eq!(adopted, [(run(0, 4), vec![0, 101, 2, 103]), (run(5, 2), vec![105, 6])]);
        assert_eq!(image.empty_runs().collect::<Vec<_>>(), [run(4, 1)]);

        let large = self::image(200_000, &[run(1, 150_000)], &[], Vec::new());
        let adopted: Vec<Run> = large.adoption().map(|adopted| adopted.run).collect();
        assert_eq!(adopted, [run(1, 65536), run(65537, 65536), run(131_073, 18_928)]);
    }

    #[test]
    #[ignore = "figures, for a machine that does nothing else"]
    fn how_long_it_takes_to_adopt_an_image_of_100_000_pieces() {
        use std::collections::VecDeque;
        use std::time::Instant;

        use swapd::{Engine, EngineConfig, Origin, OriginLayer, StoreConfig};

        const PIECES: u64 = 100_000;
        const PAGES: u64 = 1 << 20;
        let mut map = MapBuilder::new(PAGES);
        for nth in 0..PIECES {
            let kind = if nth % 2 == 0 { PageKind::Here } else { PageKind::Base };
            map.set_content(run(nth * 10, 10), kind, &[7; 10]);
        }
        let image = Image { map: map.finish(&[]), first_faults: Vec::new() };
        assert_eq!(image.stored().count() as u64, PIECES);
        let directory = testkit::directory("pieces");
        let path = directory.path().join("layer");
        std::fs::File::create(&path).unwrap().set_len(PAGES * 4096).unwrap();
        let time = |requests: &mut dyn Iterator<Item = Adopted>| {
            let layers = vec![OriginLayer::of(std::fs::File::open(&path).unwrap()).unwrap()];
            let store = StoreConfig { path: directory.path().to_owned(), overcommit: true, encrypt: false };
            let config = EngineConfig {
                memory_bytes: PAGES * 4096,
                budget_bytes: 64 << 20,
                store,
                origin: Some(Origin { layers, layer_of: LayerOf::First, cipher: None }),
                prealloc: false,
                lock: false,
                sampling: false,
            };
            let engine = Engine::start(config, Box::new(|_| {})).unwrap();
            let (handle, began, mut count) = (engine.handle(), Instant::now(), 0);
            let mut under_way = VecDeque::new();
            for adopted in requests {
                under_way.push_back(handle.adopt_async(adopted));
                count += 1;
                if under_way.len() == 16 {
                    under_way.pop_front().unwrap().blocking_recv().unwrap().unwrap();
                }
            }
            under_way.into_iter().for_each(|answer| answer.blocking_recv().unwrap().unwrap());
            assert_eq!(handle.stats().unwrap().origin_bytes, PIECES * 10 * 4096);
            println!("{count:>7} requests: {:?}", began.elapsed());
        };
        for _ in 0..3 {
            time(&mut image.stored().map(|piece| Adopted { run: piece.run, sums: piece.sums.to_vec() }));
            time(&mut image.adoption());
        }
    }
}
