//! Checkpoints in an object store that speaks S3: a stream goes up in parts and comes down in pieces, a few at a time.
//!
//! An object is there when the last part is, and the store has been told that these are all; until then nothing is to
//! be seen of it, and what goes wrong takes the parts away again.

use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;
use std::{env, thread};

use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{
    BackoffConfig, Error, GetOptions, GetRange, MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload,
    RetryConfig,
};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use vmprocess::failure::{Failure, FailureKind, chain};
use vmprocess::signals;

/// Least bytes of a part; the protocol asks for 5 MiB.
const PART_BYTES: u64 = 16 << 20;
/// The protocol has 10 000 parts; some to spare.
const PARTS_MAX: u64 = 9_900;
/// Parts, or pieces, under way at once.
const AT_ONCE: usize = 4;
/// What is read at once.
const PIECE_BYTES: u64 = 8 << 20;
/// For how long the parts of an upload that has failed may take to go.
const ABORT_TIMEOUT: Duration = Duration::from_secs(20);
/// Each of these says that there are credentials.
const CREDENTIALS: [&str; 5] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
];

/// An object in a store.
#[derive(Debug)]
pub(crate) struct Store {
    url: String,
    path: Path,
    /// Gives up soon: whether anybody is there at all.
    first: AmazonS3,
    /// Goes on through a store's bad minutes.
    patient: AmazonS3,
    runtime: Runtime,
    stop: watch::Receiver<bool>,
    /// Ends the thread that waits for a signal.
    _bell: PipeWriter,
}

impl Store {
    /// Takes up what the environment says of the store. Asks nobody yet.
    ///
    /// # Errors
    /// If the address or the environment is wrong.
    pub(crate) fn open(url: &str) -> Result<Store, Failure> {
        let usage = |text: String| Failure::new(FailureKind::Usage, text);
        let address = url.strip_prefix("s3://").and_then(|rest| rest.split_once('/'));
        let (bucket, key) = address
            .filter(|(bucket, key)| !bucket.is_empty() && !key.is_empty())
            .ok_or_else(|| usage(format!("{url} is no s3://BUCKET/KEY")))?;
        let path = Path::parse(key).map_err(|error| usage(format!("{url}: {error}")))?;
        if CREDENTIALS.iter().all(|name| env::var_os(name).is_none()) {
            let text = "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment";
            return Err(usage(format!("{url}: {text}")));
        }
        // Another one may be there already: then that one is used.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let build = |max_retries, retry_timeout| {
            let backoff = BackoffConfig { max_backoff: Duration::from_secs(5), ..BackoffConfig::default() };
            let retry = RetryConfig { backoff, max_retries, retry_timeout };
            let builder = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry);
            builder.build().map_err(|error| usage(format!("{url}: {}", chain(&error))))
        };
        let (first, patient) = (build(3, Duration::from_secs(10))?, build(20, Duration::from_secs(180))?);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|error| Failure::io("start a runtime", &error))?;
        let (told, stop) = watch::channel(false);
        let (ended, bell) = io::pipe().map_err(|error| Failure::io("make a pipe", &error))?;
        thread::spawn(move || {
            // Returns when a signal has come, or the other end is closed.
            while signals::caught().is_none() && !signals::wait_readable(ended.as_fd(), None) {}
            let _ = told.send(signals::caught().is_some());
        });
        Ok(Store { url: url.to_owned(), path, first, patient, runtime, stop, _bell: bell })
    }

    /// Begins an object of so many bytes.
    ///
    /// # Errors
    /// If there is such an object, or the store does not take one.
    pub(crate) fn upload(&self, total: u64) -> Result<Upload<'_>, Failure> {
        match self.wait(self.first.head(&self.path))? {
            Ok(_) => {
                let text = format!("{} is there already: remove it, or name another", self.url);
                return Err(Failure::new(FailureKind::Name, text));
            }
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(self.failure(&error)),
        }
        let upload = self.wait(self.patient.put_multipart(&self.path))?;
        let upload = upload.map_err(|error| self.failure(&error))?;
        let part_bytes = total.div_ceil(PARTS_MAX).next_multiple_of(1 << 20).max(PART_BYTES) as usize;
        let part = Vec::with_capacity(part_bytes);
        Ok(Upload {
            store: self,
            upload,
            part,
            part_bytes,
            flying: JoinSet::new(),
            failed: None,
            done: false,
        })
    }

    /// Begins to read the object.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn download(&self) -> Result<Download<'_>, Failure> {
        let meta = self.wait(self.first.head(&self.path))?.map_err(|error| self.failure(&error))?;
        let store = Arc::new(self.patient.clone());
        Ok(Download {
            from: self,
            store,
            size: meta.size,
            tag: meta.e_tag,
            next: 0,
            flying: VecDeque::new(),
            piece: Vec::new(),
            at: 0,
            failed: None,
        })
    }

    /// Waits for it, or for a signal.
    fn wait<T>(&self, future: impl Future<Output = T>) -> Result<T, Failure> {
        let mut stop = self.stop.clone();
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                Ok(_) = stop.wait_for(|stop| *stop) => {
                    Err(signals::check().err().unwrap_or_else(|| Failure::new(FailureKind::Interrupted, "interrupted")))
                }
                done = future => Ok(done),
            }
        })
    }

    fn failure(&self, error: &Error) -> Failure {
        let text = chain(error);
        let (kind, why) = match error {
            Error::NotFound { .. } if text.contains("NoSuchBucket") => {
                (FailureKind::Name, "there is no such bucket")
            }
            Error::NotFound { .. } => (FailureKind::Name, "there is no such object, or no such bucket"),
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                (FailureKind::Link, "the store refuses these credentials")
            }
            Error::Precondition { .. } => (FailureKind::Damaged, "the object was replaced while it was read"),
            _ => (FailureKind::Link, "the store cannot be reached, or does not do it"),
        };
        Failure::new(kind, format!("{}: {why}: {text}", self.url))
    }
}

/// An object that is being written. Dropped before it is complete, nothing is left of it.
#[derive(Debug)]
pub(crate) struct Upload<'a> {
    store: &'a Store,
    upload: Box<dyn MultipartUpload>,
    part: Vec<u8>,
    part_bytes: usize,
    flying: JoinSet<object_store::Result<()>>,
    failed: Option<Failure>,
    done: bool,
}

impl Upload<'_> {
    /// Why the last write has failed.
    pub(crate) fn failed(&mut self) -> Option<Failure> {
        self.failed.take()
    }

    /// Makes an object of what was written.
    ///
    /// # Errors
    /// If the store does not take it, or a signal comes before all of it is there.
    pub(crate) fn complete(mut self) -> Result<(), Failure> {
        self.send()?;
        while !self.flying.is_empty() {
            self.land()?;
        }
        signals::check()?;
        // Not ended by a signal: whether there is an object would not be known.
        let completed = self.store.runtime.block_on(self.upload.complete());
        completed.map_err(|error| self.store.failure(&error))?;
        self.done = true;
        Ok(())
    }

    /// Sends what there is as a part.
    fn send(&mut self) -> Result<(), Failure> {
        if self.part.is_empty() {
            return Ok(());
        }
        while self.flying.len() >= AT_ONCE {
            self.land()?;
        }
        let part = std::mem::replace(&mut self.part, Vec::with_capacity(self.part_bytes));
        let put = self.upload.put_part(PutPayload::from(part));
        self.flying.spawn_on(put, self.store.runtime.handle());
        Ok(())
    }

    /// Waits for one of the parts under way.
    fn land(&mut self) -> Result<(), Failure> {
        match self.store.wait(self.flying.join_next())? {
            None | Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(error))) => Err(self.store.failure(&error)),
            Some(Err(error)) => Err(Failure::other(&error)),
        }
    }
}

impl Write for Upload<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(self.part_bytes - self.part.len());
        self.part.extend_from_slice(&bytes[..len]);
        if self.part.len() == self.part_bytes
            && let Err(failure) = self.send()
        {
            self.failed = Some(failure.clone());
            return Err(io::Error::other(failure));
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let Upload { store, upload, flying, .. } = self;
        let aborted = store.runtime.block_on(async {
            // A part that came after the abort would stay.
            flying.shutdown().await;
            tokio::time::timeout(ABORT_TIMEOUT, upload.abort()).await
        });
        if !matches!(aborted, Ok(Ok(()))) {
            tracing::warn!("{}: parts of what was not completed are left in the store", store.url);
        }
    }
}

/// An object that is being read.
#[derive(Debug)]
pub(crate) struct Download<'a> {
    from: &'a Store,
    store: Arc<AmazonS3>,
    size: u64,
    /// Of the object as it was at first.
    tag: Option<String>,
    /// Where the next piece begins that is to be asked for.
    next: u64,
    flying: VecDeque<JoinHandle<object_store::Result<Vec<u8>>>>,
    piece: Vec<u8>,
    /// What of the piece was taken.
    at: usize,
    failed: Option<Failure>,
}

impl Download<'_> {
    /// Why the last read has failed.
    pub(crate) fn failed(&mut self) -> Option<Failure> {
        self.failed.take()
    }

    /// The next piece; an empty one at the end.
    fn piece(&mut self) -> Result<Vec<u8>, Failure> {
        while self.flying.len() < AT_ONCE && self.next < self.size {
            let end = self.size.min(self.next + PIECE_BYTES);
            let range = Some(GetRange::Bounded(self.next..end));
            let options = GetOptions { range, if_match: self.tag.clone(), ..GetOptions::default() };
            let (store, path) = (self.store.clone(), self.from.path.clone());
            self.flying.push_back(self.from.runtime.spawn(async move {
                let got = store.get_opts(&path, options).await?;
                Ok(got.bytes().await?.to_vec())
            }));
            self.next = end;
        }
        let Some(piece) = self.flying.pop_front() else { return Ok(Vec::new()) };
        match self.from.wait(piece)? {
            Ok(Ok(piece)) => Ok(piece),
            Ok(Err(error)) => Err(self.from.failure(&error)),
            Err(error) => Err(Failure::other(&error)),
        }
    }
}

impl Read for Download<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            self.piece = self.piece().map_err(|failure| {
                self.failed = Some(failure.clone());
                io::Error::other(failure)
            })?;
            self.at = 0;
        }
        let len = bytes.len().min(self.piece.len() - self.at);
        bytes[..len].copy_from_slice(&self.piece[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

impl Drop for Download<'_> {
    fn drop(&mut self) {
        self.flying.iter().for_each(JoinHandle::abort);
    }
}
