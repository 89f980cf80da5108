//! A checkpoint's image for tests: files in which page *n* is at byte *n* x 4096, and the checksums of what they have.
#![allow(dead_code, unreachable_pub)]

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use swapd::digest::page_sum;
use swapd::{Adopted, Cipher, EngineHandle, LayerOf, Origin, OriginLayer, PAGE_SIZE, PageNo, Run};
use testkit::pages::{WORDS, word};

/// What the image's pages have: version 1 of their content.
pub const ROUND: u64 = 1;
/// Pages that are adopted at a time.
const STEP: u32 = 1 << 14;

pub struct Image {
    pub paths: Vec<PathBuf>,
    pub pages: u64,
    layers: Vec<u8>,
    sums: Vec<u64>,
    /// With which what is in the files is encrypted.
    cipher: Option<Arc<Cipher>>,
}

pub fn content(page: PageNo, round: u64) -> Vec<u8> {
    (0..WORDS).flat_map(|nth| word(page.0, round, nth).to_le_bytes()).collect()
}

impl Image {
    /// For a VM of so many pages, in so many files. A page that is not `there` is in none; of the others, one to seven
    /// neighbours are in the same file.
    pub fn new(directory: &Path, pages: u64, files: u8, there: impl Fn(PageNo) -> bool) -> Image {
        Image::with(None, directory, pages, files, there)
    }

    /// The same with a key.
    pub fn encrypted(directory: &Path, pages: u64, files: u8, there: impl Fn(PageNo) -> bool) -> Image {
        let cipher = Arc::new(Cipher::with_key(&[7; Cipher::KEY_BYTES]));
        Image::with(Some(cipher), directory, pages, files, there)
    }

    fn with(
        cipher: Option<Arc<Cipher>>,
        directory: &Path,
        pages: u64,
        files: u8,
        there: impl Fn(PageNo) -> bool,
    ) -> Image {
        let paths: Vec<_> = (0..files).map(|nth| directory.join(format!("layer-{nth}.img"))).collect();
        let layer_of = |page: u64| match there(PageNo(page)) {
            true => (page / (1 + page / 64 % 7) % u64::from(files)) as u8,
            false => Origin::NO_LAYER,
        };
        let layers: Vec<_> = (0..pages).map(layer_of).collect();
        let image = Image { paths, pages, sums: vec![0; pages as usize], layers, cipher };
        image.written()
    }

    /// The same in one file that is there already, such as a device.
    pub fn in_file(path: &Path, pages: u64, there: impl Fn(PageNo) -> bool) -> Image {
        let layers = (0..pages).map(|page| if there(PageNo(page)) { 0 } else { Origin::NO_LAYER }).collect();
        Image { paths: vec![path.into()], pages, sums: vec![0; pages as usize], layers, cipher: None }
            .written()
    }

    fn written(mut self) -> Image {
        for (layer, path) in self.paths.iter().enumerate() {
            let file = File::options().write(true).create(true).truncate(false).open(path).unwrap();
            if file.metadata().unwrap().is_file() {
                file.set_len(self.pages * PAGE_SIZE as u64).unwrap();
            }
            let mut file = BufWriter::with_capacity(1 << 20, file);
            let mut at = PageNo(u64::MAX);
            for page in
                (0..self.pages).map(PageNo).filter(|page| usize::from(self.layers[page.index()]) == layer)
            {
                if at != page {
                    file.seek(SeekFrom::Start(page.offset())).unwrap();
                }
                let mut bytes = content(page, ROUND);
                self.sums[page.index()] = page_sum(page, &bytes);
                if let Some(cipher) = &self.cipher {
                    cipher.encrypt(Run::one(page), &mut bytes);
                }
                file.write_all(&bytes).unwrap();
                at = page.plus(1);
            }
            file.into_inner().unwrap().sync_all().unwrap();
        }
        self
    }

    pub fn has(&self, page: PageNo) -> bool {
        self.layers[page.index()] != Origin::NO_LAYER
    }

    /// How many pages have their content in it.
    pub fn count(&self) -> u64 {
        (0..self.pages).map(PageNo).filter(|page| self.has(*page)).count() as u64
    }

    /// The file that has the page.
    pub fn path_of(&self, page: PageNo) -> &Path {
        &self.paths[usize::from(self.layers[page.index()])]
    }

    /// An origin for one engine.
    pub fn origin(&self) -> Origin {
        self.origin_opened_by(OriginLayer::open)
    }

    /// The same read through the page cache.
    pub fn buffered_origin(&self) -> Origin {
        self.origin_opened_by(|path| Ok(OriginLayer { file: File::open(path)? }))
    }

    fn origin_opened_by(&self, open: impl Fn(&Path) -> io::Result<OriginLayer>) -> Origin {
        let layers = self.paths.iter().map(|path| open(path).unwrap()).collect();
        let first = self.layers.iter().all(|layer| *layer == 0);
        let layer_of = if first { LayerOf::First } else { LayerOf::PerPage(self.layers.clone()) };
        Origin { layers, layer_of, cipher: self.cipher.clone() }
    }

    /// Tells the engine what is in it.
    pub fn adopt_into(&self, handle: &EngineHandle) {
        let pages: Vec<_> = (0..self.pages).map(PageNo).filter(|page| self.has(*page)).collect();
        for run in swapd::units::runs_of(pages, STEP) {
            handle.adopt(Adopted { run, sums: self.sums[run.indices()].to_vec() }).unwrap();
        }
    }

    pub fn sums_of(&self, run: Run) -> Vec<u64> {
        self.sums[run.indices()].to_vec()
    }

    /// Checksums of all that is in its files, which may be too much for this host's memory.
    pub fn digest(&self) -> Vec<u64> {
        let mut sums = Vec::new();
        let mut bytes = vec![0; PAGE_SIZE];
        for path in &self.paths {
            let mut file = BufReader::with_capacity(1 << 20, File::open(path).unwrap());
            for page in (0..self.pages).map(PageNo) {
                file.read_exact(&mut bytes).unwrap();
                sums.push(page_sum(page, &bytes));
            }
            assert_eq!(file.read(&mut bytes).unwrap(), 0, "it has grown");
        }
        sums
    }
}
