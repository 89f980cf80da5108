//! The origin: files from which pages come and to which none goes, a checkpoint's image with those that it is based on.
//!
//! Page *n* is the 4096 bytes at offset *n* x 4096 of the *layer* that has it, plain as the guest wrote them, or
//! encrypted with the origin's one key. Several VMs may have the same files for their origin, so nothing here can
//! write: the files must be open for reading alone.
//! A page is believed only if its checksum is the one that was adopted with it, as with every tier.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, OFlags, StatxFlags};
use swapcore::units::{PAGE_SIZE, PageNo, Run, pages_in};

use crate::cipher::Cipher;

/// What a VM's pages are read from until they have a place at their home.
#[derive(Debug)]
pub struct Origin {
    /// At least one, at most [`Origin::LAYERS_MAX`].
    pub layers: Vec<OriginLayer>,
    /// Which of them has which page.
    pub layer_of: LayerOf,
    /// With which all pages are encrypted; none: they are plain.
    pub cipher: Option<Arc<Cipher>>,
}

/// One file of an origin, page *n* at offset *n* x 4096.
#[derive(Debug)]
pub struct OriginLayer {
    /// Open for reading alone, with `O_DIRECT` where its file system can: else what is read stays in the page cache as
    /// well.
    pub file: File,
}

/// The layer of each page.
#[derive(Clone, Debug)]
pub enum LayerOf {
    /// All pages are in the first layer.
    First,
    /// One number for each page of the VM's memory, in the order of [`Origin::layers`]; [`Origin::NO_LAYER`] for a page
    /// that none of them has.
    PerPage(Vec<u8>),
}

/// Why files cannot be an origin. Layers are numbered from 0.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the texts say what the fields are")]
pub enum OriginError {
    /// None, or more than have numbers.
    #[error("an origin has 1 to {} layers, not {layers}; merge some of the checkpoints", Origin::LAYERS_MAX)]
    Layers { layers: usize },
    /// It was made for a VM of another size.
    #[error(
        "the origin says of {pages} pages where they are, and the VM has {wanted}; give the VM as much memory"
    )]
    NotTheMemory { pages: u64, wanted: u64 },
    /// A number that no layer has.
    #[error("{page} is said to be in layer {layer} of the origin, which has {layers}")]
    NoSuchLayer { page: PageNo, layer: u8, layers: usize },
    /// The file cannot even be looked at.
    #[error("layer {layer} of the origin cannot be used: {source}")]
    Unusable { layer: usize, source: io::Error },
    /// A pipe, a directory, or another thing without places.
    #[error("layer {layer} of the origin is neither a file nor a block device")]
    NeitherKind { layer: usize },
    /// Another VM may have the same file.
    #[error("layer {layer} of the origin is open for writing; open it for reading alone")]
    Writable { layer: usize },
    /// Direct I/O there takes larger blocks than pages.
    #[error(
        "layer {layer} of the origin can be read directly only in blocks of {block_bytes} bytes; open it without \
         O_DIRECT"
    )]
    Blocks { layer: usize, block_bytes: u32 },
    /// The file ends before the last page that it is said to have.
    #[error(
        "layer {layer} of the origin ends at {available_bytes} bytes, before {page}, which it should have"
    )]
    Short { layer: usize, page: PageNo, available_bytes: u64 },
}

impl Origin {
    /// As many layers as have numbers.
    pub const LAYERS_MAX: usize = Self::NO_LAYER as usize;
    /// In [`LayerOf::PerPage`]: no layer has this page.
    pub const NO_LAYER: u8 = u8::MAX;
}

impl OriginLayer {
    /// Opens a file as a layer: for direct I/O, or where its file system cannot do that, through the page cache.
    ///
    /// # Errors
    /// If it cannot be opened for reading.
    pub fn open(path: &Path) -> io::Result<OriginLayer> {
        let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(path);
        let file = match direct {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => File::open(path)?,
            opened => opened?,
        };
        OriginLayer::of(file)
    }

    /// A file that is open already. Where direct I/O takes larger blocks than pages, it is read through the page cache
    /// from now on.
    ///
    /// # Errors
    /// If it cannot be looked at.
    pub fn of(file: File) -> io::Result<OriginLayer> {
        if direct_block_bytes(&file)?.is_some_and(|bytes| bytes as usize > PAGE_SIZE) {
            end_direct(&file)?;
        }
        Ok(OriginLayer { file })
    }
}

/// What direct I/O of the file works in; None if it is not open for that, or nobody tells.
fn direct_block_bytes(file: &File) -> io::Result<Option<u32>> {
    if !rustix::fs::fcntl_getfl(file)?.contains(OFlags::DIRECT) {
        return Ok(None);
    }
    let found = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    let told = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::DIOALIGN);
    Ok(told.then(|| found.stx_dio_offset_align.max(found.stx_dio_mem_align)))
}

/// Its locks stay, and so does all that is a duplicate of it.
fn end_direct(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags - OFlags::DIRECT)?)
}

/// An origin that has been found fit for its VM.
#[derive(Debug)]
pub(crate) struct Layers {
    layers: Vec<Layer>,
    layer_of: LayerOf,
    cipher: Option<Arc<Cipher>>,
    closed: AtomicBool,
}

/// A layer that has been looked at.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) file: File,
    /// To begin to read it may take as long as the read itself, whatever io_uring has been told: FUSE waits for its
    /// server's answer there. Such reads are for threads of the kernel's, or a silent server would have the engine wait
    /// for it, and all of the VM's other pages with the engine.
    pub(crate) blocks: bool,
}

impl Layers {
    /// Takes only as long as a look at one byte a page, whatever the files' size.
    pub(crate) fn check(origin: Origin, pages: u64) -> Result<Layers, OriginError> {
        let Origin { layers, layer_of, cipher } = origin;
        if layers.is_empty() || layers.len() > Origin::LAYERS_MAX {
            return Err(OriginError::Layers { layers: layers.len() });
        }
        if let LayerOf::PerPage(numbers) = &layer_of {
            check_numbers(numbers, layers.len(), pages)?;
        }
        let mut checked = Vec::with_capacity(layers.len());
        for (layer, OriginLayer { file }) in layers.into_iter().enumerate() {
            let available_bytes = check_file(layer, &file)?;
            if let Some(page) = last_beyond(&layer_of, layer, pages_in(available_bytes), pages) {
                return Err(OriginError::Short { layer, page, available_bytes });
            }
            let blocks = may_block(&file).map_err(|source| OriginError::Unusable { layer, source })?;
            checked.push(Layer { file, blocks });
        }
        Ok(Layers { layers: checked, layer_of, cipher, closed: AtomicBool::new(false) })
    }

    /// With which what is read here is to be decrypted, if it is encrypted.
    pub(crate) fn cipher(&self) -> Option<&Cipher> {
        self.cipher.as_deref()
    }

    pub(crate) fn layer(&self, nth: usize) -> &Layer {
        &self.layers[nth]
    }

    /// Whether a read of any of them may wait where it is begun.
    pub(crate) fn any_blocks(&self) -> bool {
        self.layers.iter().any(|layer| layer.blocks)
    }

    /// One a layer, in their order.
    pub(crate) fn files(&self) -> impl ExactSizeIterator<Item = &File> {
        self.layers.iter().map(|layer| &layer.file)
    }

    /// Closes the files, whoever shares this: nobody reads there any more. In their place is the end of a pipe that
    /// cannot be read, so that a read would be an error, and never another file's content.
    pub(crate) fn close(&self) -> io::Result<()> {
        self.closed.store(true, Ordering::SeqCst);
        let (_, writer) = io::pipe()?;
        for file in self.files() {
            // SAFETY: both are descriptors that are open and owned here; the file's number stays its `File`'s own, and
            // names another open description. Safe code can close a file only by its owner, and there are many.
            if unsafe { libc::dup3(writer.as_raw_fd(), file.as_raw_fd(), libc::O_CLOEXEC) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Whether no layer has one of the run's pages, all of which are in the VM's memory.
    pub(crate) fn lacks(&self, run: Run) -> bool {
        if self.closed.load(Ordering::SeqCst) {
            return true;
        }
        let LayerOf::PerPage(numbers) = &self.layer_of else { return false };
        numbers.get(run.indices()).is_some_and(|layers| layers.contains(&Origin::NO_LAYER))
    }

    /// The layer that has the run's first page, and how many of its pages follow it there.
    ///
    /// # Panics
    /// If none has it: such a page cannot be adopted.
    pub(crate) fn first_part(&self, run: Run) -> (usize, Run) {
        let LayerOf::PerPage(numbers) = &self.layer_of else { return (0, run) };
        let numbers = &numbers[run.indices()];
        let layer = numbers[0];
        assert_ne!(layer, Origin::NO_LAYER, "{} is at the origin, and none of its layers has it", run.start);
        let len = numbers.iter().take_while(|number| **number == layer).count();
        (usize::from(layer), run.part(0, len as u32))
    }
}

fn check_numbers(numbers: &[u8], layers: usize, wanted: u64) -> Result<(), OriginError> {
    let pages = numbers.len() as u64;
    if pages != wanted {
        return Err(OriginError::NotTheMemory { pages, wanted });
    }
    // No layer counts as 0, the first as 1. Without a way out in the middle, so that the compiler makes it a few
    // instructions for many pages.
    let needed = |layer: &u8| usize::from(layer.wrapping_add(1));
    let most = numbers.iter().fold(0u8, |most, layer| most.max(layer.wrapping_add(1)));
    if usize::from(most) <= layers {
        return Ok(());
    }
    let nth = numbers.iter().position(|layer| needed(layer) > layers).expect("there is one");
    Err(OriginError::NoSuchLayer { page: PageNo(nth as u64), layer: numbers[nth], layers })
}

/// Looks at the layer's file, and says how long it is.
fn check_file(layer: usize, mut file: &File) -> Result<u64, OriginError> {
    let unusable = |source: io::Error| OriginError::Unusable { layer, source };
    let kind = file.metadata().map_err(unusable)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OriginError::NeitherKind { layer });
    }
    let flags = rustix::fs::fcntl_getfl(file).map_err(|errno| unusable(errno.into()))?;
    if flags & OFlags::RWMODE != OFlags::RDONLY {
        return Err(OriginError::Writable { layer });
    }
    if let Some(block_bytes) = direct_block_bytes(file).map_err(unusable)?
        && block_bytes as usize > PAGE_SIZE
    {
        return Err(OriginError::Blocks { layer, block_bytes });
    }
    file.seek(SeekFrom::End(0)).map_err(unusable)
}

/// Whether a read of the file may wait where it is begun. Not on a device, nor on the file systems of disks that are
/// known to give an unfinished read back to io_uring.
fn may_block(file: &File) -> io::Result<bool> {
    const QUICK: [libc::__fsword_t; 5] = [
        libc::EXT4_SUPER_MAGIC,
        libc::XFS_SUPER_MAGIC,
        libc::BTRFS_SUPER_MAGIC,
        libc::F2FS_SUPER_MAGIC,
        libc::TMPFS_MAGIC,
    ];
    let is_device = file.metadata()?.file_type().is_block_device();
    Ok(!is_device && !QUICK.contains(&rustix::fs::fstatfs(file)?.f_type))
}

/// The last page that the layer is to have and that is behind its first `available` pages.
fn last_beyond(layer_of: &LayerOf, layer: usize, available: u64, pages: u64) -> Option<PageNo> {
    if available >= pages {
        return None;
    }
    match layer_of {
        LayerOf::First => (layer == 0).then(|| PageNo(pages - 1)),
        LayerOf::PerPage(numbers) => {
            let behind = &numbers[available as usize..];
            let nth = behind.iter().rposition(|number| usize::from(*number) == layer)?;
            Some(PageNo(available + nth as u64))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 1024;

    fn layers(directory: &testkit::TempDir, lengths: &[u64]) -> Vec<OriginLayer> {
        let layer = |(nth, pages): (usize, &u64)| {
            let path = directory.path().join(format!("layer-{nth}"));
            File::create(&path).unwrap().set_len(pages * PAGE_SIZE as u64).unwrap();
            OriginLayer::open(&path).unwrap()
        };
        lengths.iter().enumerate().map(layer).collect()
    }

    fn refused(layers: Vec<OriginLayer>, layer_of: LayerOf) -> OriginError {
        Layers::check(Origin { layers, layer_of, cipher: None }, PAGES).expect_err("no such origin can be")
    }

    #[test]
    fn a_run_is_cut_where_the_layer_changes() {
        let directory = testkit::directory("origin");
        let mut numbers = vec![Origin::NO_LAYER; PAGES as usize];
        numbers[10..20].fill(2);
        numbers[20..21].fill(0);
        numbers[21..30].fill(2);
        // Each file has what it is asked for, and layer 1, which has nothing, is empty.
        let layers = layers(&directory, &[21, 0, 30]);
        let origin = Origin { layers, layer_of: LayerOf::PerPage(numbers), cipher: None };
        let origin = Layers::check(origin, PAGES).unwrap();
        let mut rest = Run::new(PageNo(12), 18);
        let mut parts = Vec::new();
        while rest.len > 0 {
            let (layer, part) = origin.first_part(rest);
            parts.push((layer, part.start.0, part.len));
            rest = rest.part(part.len, rest.len - part.len);
        }
        assert_eq!(parts, [(2, 12, 8), (0, 20, 1), (2, 21, 9)]);
        assert!(!origin.lacks(Run::new(PageNo(10), 20)));
        assert!(origin.lacks(Run::new(PageNo(10), 21)));
    }

    #[test]
    fn a_file_goes_on_without_direct_io_and_keeps_its_lock() {
        let directory = testkit::directory("origin");
        let path = directory.path().join("layer");
        std::fs::write(&path, vec![7; PAGE_SIZE]).unwrap();
        let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
        file.try_lock().unwrap();
        let other = file.try_clone().unwrap();
        end_direct(&file).unwrap();
        assert_eq!(direct_block_bytes(&other).unwrap(), None);
        let mut bytes = [0; 100];
        std::os::unix::fs::FileExt::read_exact_at(&other, &mut bytes, 33).unwrap();
        assert_eq!(bytes, [7; 100]);
        assert!(File::open(&path).unwrap().try_lock().is_err());
    }

    #[test]
    fn what_cannot_be_an_origin_is_refused_by_name() {
        let directory = testkit::directory("origin");
        let file = |lengths: &[u64]| layers(&directory, lengths);
        let per_page = |layer: u8| LayerOf::PerPage(vec![layer; PAGES as usize]);
        assert!(matches!(refused(Vec::new(), LayerOf::First), OriginError::Layers { layers: 0 }));
        let error = refused(file(&[PAGES]), LayerOf::PerPage(vec![0; PAGES as usize - 1]));
        assert!(matches!(error, OriginError::NotTheMemory { pages: 1023, wanted: PAGES }), "{error}");
        let error = refused(file(&[PAGES]), per_page(1));
        assert!(
            matches!(error, OriginError::NoSuchLayer { page: PageNo(0), layer: 1, layers: 1 }),
            "{error}"
        );
        let error = refused(file(&[PAGES - 1]), LayerOf::First);
        assert!(matches!(error, OriginError::Short { layer: 0, page: PageNo(1023), .. }), "{error}");
        let error = refused(file(&[PAGES, 5]), per_page(1));
        assert!(matches!(error, OriginError::Short { layer: 1, page: PageNo(1023), .. }), "{error}");
        let path = directory.path().join("layer-0");
        let writable = File::options().read(true).write(true).open(&path).unwrap();
        let error = refused(vec![OriginLayer { file: writable }], LayerOf::First);
        assert!(matches!(error, OriginError::Writable { layer: 0 }), "{error}");
        let error =
            refused(vec![OriginLayer { file: File::open(directory.path()).unwrap() }], LayerOf::First);
        assert!(matches!(error, OriginError::NeitherKind { layer: 0 }), "{error}");
    }
}
