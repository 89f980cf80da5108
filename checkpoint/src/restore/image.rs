//! A checkpoint's memory, resolved through its bases: which pages have content, in which layer it is, what is lost.

use swapd::{Adopted, LayerOf, Origin, PageNo, Run};

use crate::format::{FirstFaults, MapPiece, MemoryMap, PageKind};

/// Pages that are adopted by one request: the engine takes so many without holding up a fault for long.
pub const ADOPT_PAGES: u32 = 1 << 16;

/// The memory of a checkpoint.
#[derive(Clone, Debug)]
pub struct Image {
    map: MemoryMap,
    first_faults: Vec<Run>,
}

/// Why maps make no image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// A base has another number of pages.
    #[error("its base has memory of another size")]
    OtherSize,
    /// There are more layers than can be numbered.
    #[error("it is the last of more than {} checkpoints, each the base of the next: merge some", Origin::LAYERS_MAX)]
    TooDeep,
    /// A page is in a base that is not there.
    #[error("{0} is said to be in a base, and there is none")]
    NoBase(PageNo),
    /// A page is in a base that does not have it.
    #[error("{0} is said to be in a base, which does not have it")]
    NotInBase(PageNo),
}

impl Image {
    /// From the maps of a checkpoint and its bases, the newest first; and the layer of each page.
    ///
    /// # Errors
    /// If a page's content is nowhere.
    ///
    /// # Panics
    /// If there is no map at all.
    pub fn resolve(mut maps: Vec<MemoryMap>) -> Result<(Image, LayerOf), ResolveError> {
        let map = maps.remove(0);
        let bases = maps;
        if bases.iter().any(|base| base.pages() != map.pages()) {
            return Err(ResolveError::OtherSize);
        }
        if bases.len() >= Origin::LAYERS_MAX {
            return Err(ResolveError::TooDeep);
        }
        // Zeroed by the kernel when they are first touched: most of a large memory never is.
        let mut layers = if bases.is_empty() { Vec::new() } else { vec![0; map.pages() as usize] };
        for piece in map.pieces().filter(|piece| piece.kind == PageKind::Base) {
            below(&bases, 1, piece.run, &mut layers)?;
        }
        let layers = if layers.is_empty() { LayerOf::First } else { LayerOf::PerPage(layers) };
        Ok((Image { map, first_faults: Vec::new() }, layers))
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
        self.stored().flat_map(|piece| {
            let starts = (0..piece.run.len).step_by(ADOPT_PAGES as usize);
            starts.map(move |skip| {
                let run = piece.run.part(skip, ADOPT_PAGES.min(piece.run.len - skip));
                let sums = &piece.sums[skip as usize..][..run.len as usize];
                Adopted { run, sums: sums.to_vec() }
            })
        })
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

/// Finds the layers of pages that are in a base, from that layer on down.
fn below(bases: &[MemoryMap], layer: usize, run: Run, layers: &mut [u8]) -> Result<(), ResolveError> {
    let Some(base) = bases.get(layer - 1) else { return Err(ResolveError::NoBase(run.start)) };
    base.pieces_in(run).try_for_each(|piece| match piece.kind {
        PageKind::Here => {
            layers[piece.run.indices()].fill(layer as u8);
            Ok(())
        }
        PageKind::Base => below(bases, layer + 1, piece.run, layers),
        PageKind::Zero | PageKind::Lost => Err(ResolveError::NotInBase(piece.run.start)),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::format::MapBuilder;

    pub(crate) fn run(start: u64, len: u32) -> Run {
        Run::new(PageNo(start), len)
    }

    /// An image of so many pages, of which these have content.
    pub(crate) fn image(pages: u64, stored: &[Run], heat: &[u8], first_faults: Vec<Run>) -> Image {
        let mut map = MapBuilder::new(pages);
        for run in stored {
            map.set_content(*run, PageKind::Here, &vec![7; run.len as usize]);
        }
        let image = Image::resolve(vec![map.finish(heat)]).unwrap().0;
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

    fn layers(maps: &[&str]) -> Result<Vec<u8>, ResolveError> {
        let pages = maps[0].len();
        Image::resolve(maps.iter().map(|kinds| map(kinds)).collect()).map(|(_, layers)| match layers {
            LayerOf::First => vec![0; pages],
            LayerOf::PerPage(layers) => layers,
        })
    }

    #[test]
    fn every_page_is_where_its_newest_content_is() {
        assert_eq!(layers(&["h.l."]), Ok(vec![0; 4]));
        assert_eq!(layers(&["hbb.lb", "h.hhhb".replace('.', "h").as_str(), "hhhhhh"]), Ok(vec![0, 1, 1, 0, 0, 2]));
        assert_eq!(layers(&["hb"]), Err(ResolveError::NoBase(PageNo(1))));
        assert_eq!(layers(&["hb", "hb"]), Err(ResolveError::NoBase(PageNo(1))));
        assert_eq!(layers(&["bb", "h."]), Err(ResolveError::NotInBase(PageNo(1))));
        assert_eq!(layers(&["bb", "hl"]), Err(ResolveError::NotInBase(PageNo(1))));
        assert_eq!(layers(&["bb", "hhh"]), Err(ResolveError::OtherSize));
        assert_eq!(layers(&vec!["b"; 256]), Err(ResolveError::TooDeep));
    }

    #[test]
    fn the_sums_are_those_of_the_newest_map_and_adoptions_are_not_too_long() {
        let (image, _) = Image::resolve(vec![map("h.bb.l"), map("hhhhhh")]).unwrap();
        let adopted: Vec<(Run, Vec<u64>)> = image.adoption().map(|adopted| (adopted.run, adopted.sums)).collect();
        assert_eq!(adopted, [(run(0, 1), vec![0]), (run(2, 2), vec![102, 103])]);
        assert_eq!(image.lost().collect::<Vec<_>>(), [run(5, 1)]);
        assert_eq!((image.stored_pages(), image.lost_pages()), (3, 1));

        let large = self::image(200_000, &[run(1, 150_000)], &[], Vec::new());
        let adopted: Vec<Run> = large.adoption().map(|adopted| adopted.run).collect();
        assert_eq!(adopted, [run(1, 65536), run(65537, 65536), run(131_073, 18_928)]);
    }
}
