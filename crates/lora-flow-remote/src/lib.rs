//! The shared tier of the artifact store: S3 buckets and folders, through `object_store`.
//!
//! The engine is synchronous and sees [`Objects`]; the asynchronous runtime lives in this file.
//! Every request ends within [`Patience`], and at once when the run is stopped.

use std::future::Future;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::Path as FilePath;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lora_flow_core::{CancelToken, Error, Result};
use lora_flow_pipeline::{Objects, RemoteError};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig,
    WriteMultipart,
};
use tokio::runtime::Runtime;
use url::{Host, Url};

/// Files over this are sent in parts of this size (S3 wants at least 5 MiB, and at most 10,000
/// parts; larger files get larger parts).
const PART: u64 = 8 << 20;

/// Parts of a file under way at once.
const PARTS_AT_ONCE: usize = 4;

/// How often a stop is noticed.
const TICK: Duration = Duration::from_millis(50);

/// How long a remote may take to answer before it counts as away.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Until a connection stands.
    pub connect: Duration,
    /// For a small request as a whole, with what is tried again.
    pub answer: Duration,
    /// Without a byte moving, within a large transfer.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            answer: Duration::from_secs(15),
            silence: Duration::from_secs(60),
        }
    }
}

/// A bucket or a folder.
#[derive(Debug)]
pub struct Bucket {
    url: String,
    prefix: Path,
    /// Why there is none, if it could not be set up.
    objects: Result<Arc<dyn ObjectStore>, String>,
    patience: Patience,
    runtime: Runtime,
}

impl Bucket {
    /// The remote of a URL: `s3://bucket/prefix`, with credentials, region and endpoint from those
    /// of `variables` that begin with `AWS_`, or `file:///folder`. Nothing is asked yet.
    ///
    /// # Errors
    /// When the URL is not one of these, or the settings do not fit.
    pub fn open(
        url: &str,
        variables: impl IntoIterator<Item = (String, String)>,
        patience: Patience,
    ) -> Result<Self> {
        let form = "it is `s3://BUCKET/PREFIX` or `file:///ABSOLUTE/FOLDER`";
        let bad =
            |why: &str| Error::new(format!("bad remote cache `{url}`: {why}")).with_hint(form);
        let parsed = Url::parse(url).map_err(|e| bad(&e.to_string()))?;
        if parsed.query().is_some() || parsed.fragment().is_some() || !parsed.username().is_empty()
        {
            return Err(bad("nothing may stand before its host or behind its path"));
        }
        let (objects, prefix): (Result<Arc<dyn ObjectStore>, _>, Path) = match parsed.scheme() {
            "s3" => {
                let prefix = Path::from_url_path(parsed.path()).map_err(|e| bad(&e.to_string()))?;
                let bucket = parsed.host_str().filter(|h| !h.is_empty());
                let bucket = bucket.ok_or_else(|| bad("it names no bucket"))?;
                (Ok(Arc::new(s3(bucket, variables, patience)?)), prefix)
            }
            "file" => {
                let folder = parsed.to_file_path().map_err(|()| bad("its path is not absolute"))?;
                // A disk that is away today is no mistake of the command line.
                let found = folder_at(&folder).map_err(|e| e.chain());
                (found.map(|f| Arc::new(f) as _), Path::default())
            }
            scheme => return Err(bad(&format!("`{scheme}` is not known"))),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("remote")
            .enable_all()
            .build()?;
        let url = url.trim_end_matches('/').to_owned();
        Ok(Self { url, prefix, objects, patience, runtime })
    }

    fn path(&self, name: &str) -> Path {
        name.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }

    fn objects(&self) -> Result<&Arc<dyn ObjectStore>, RemoteError> {
        self.objects.as_ref().map_err(|why| RemoteError::Away(Error::new(why.as_str())))
    }

    /// Waits for a request, until it is too late or the run is stopped.
    fn wait<T>(
        &self,
        cancel: &CancelToken,
        limit: Option<Duration>,
        request: impl Future<Output = Result<T, RemoteError>>,
    ) -> Result<T, RemoteError> {
        self.runtime.block_on(async {
            let mut request = pin!(request);
            let started = Instant::now();
            loop {
                if let Ok(result) = tokio::time::timeout(TICK, &mut request).await {
                    return result;
                }
                if cancel.is_cancelled() {
                    return Err(RemoteError::Cancelled);
                }
                if limit.is_some_and(|limit| started.elapsed() >= limit) {
                    let limit = self.patience.answer.as_secs_f64();
                    let message = format!("no answer within {limit} s");
                    return Err(RemoteError::Away(Error::new(message)));
                }
            }
        })
    }

    fn small<T>(
        &self,
        cancel: &CancelToken,
        request: impl Future<Output = Result<T, RemoteError>>,
    ) -> Result<T, RemoteError> {
        self.wait(cancel, Some(self.patience.answer), request)
    }
}

/// Ends a wait for the next bytes of a transfer that stands still.
async fn moving<T>(limit: Duration, step: impl Future<Output = T>) -> Result<T, RemoteError> {
    tokio::time::timeout(limit, step).await.map_err(|_| {
        let limit = limit.as_secs_f64();
        RemoteError::Away(Error::new(format!("the transfer stood still for {limit} s")))
    })
}

impl Objects for Bucket {
    fn url(&self) -> &str {
        &self.url
    }

    fn get(
        &self,
        name: &str,
        limit: u64,
        cancel: &CancelToken,
    ) -> Result<Option<Vec<u8>>, RemoteError> {
        let path = self.path(name);
        self.small(cancel, async {
            let Some(found) = present(self.objects()?.get(&path).await)? else { return Ok(None) };
            if found.meta.size > limit {
                let message = format!("`{name}` has {} bytes", found.meta.size);
                return Err(RemoteError::Away(Error::new(message)));
            }
            Ok(Some(found.bytes().await.map_err(explain)?.to_vec()))
        })
    }

    fn size(&self, name: &str, cancel: &CancelToken) -> Result<Option<u64>, RemoteError> {
        let path = self.path(name);
        self.small(cancel, async {
            Ok(present(self.objects()?.head(&path).await)?.map(|meta| meta.size))
        })
    }

    fn download(
        &self,
        name: &str,
        to: &FilePath,
        limit: u64,
        cancel: &CancelToken,
    ) -> Result<Option<u64>, RemoteError> {
        let path = self.path(name);
        let found = self.small(cancel, async { present(self.objects()?.get(&path).await) })?;
        let Some(found) = found else { return Ok(None) };
        let mut file = fs_err::File::create(to).map_err(local)?;
        self.wait(cancel, None, async {
            let mut written = 0;
            let mut chunks = found.into_stream();
            while let Some(chunk) = moving(self.patience.silence, chunks.next()).await? {
                let chunk = chunk.map_err(explain)?;
                file.write_all(&chunk).map_err(local)?;
                written += chunk.len() as u64;
                if written > limit {
                    break;
                }
            }
            Ok(Some(written))
        })
    }

    fn put(&self, name: &str, bytes: Vec<u8>, cancel: &CancelToken) -> Result<(), RemoteError> {
        let path = self.path(name);
        self.wait(cancel, None, async {
            let put = self.objects()?.put(&path, PutPayload::from(bytes));
            moving(self.patience.silence, put).await?.map_err(explain)?;
            Ok(())
        })
    }

    fn upload(&self, name: &str, from: &FilePath, cancel: &CancelToken) -> Result<(), RemoteError> {
        let mut file = fs_err::File::open(from).map_err(local)?;
        let size = file.metadata().map_err(local)?.len();
        if size <= PART {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(local)?;
            return self.put(name, bytes, cancel);
        }
        let path = self.path(name);
        let start = async { self.objects()?.put_multipart(&path).await.map_err(explain) };
        let upload = self.small(cancel, start)?;
        let part = usize::try_from(PART.max(size.div_ceil(9_000))).unwrap_or(usize::MAX);
        // Writing spawns requests, for which the runtime must be at hand.
        let _inside = self.runtime.enter();
        let mut writer = WriteMultipart::new_with_chunk_size(upload, part);
        let mut buffer = vec![0; part];
        let sent = (|| {
            loop {
                let n = file.read(&mut buffer).map_err(local)?;
                if n == 0 {
                    return Ok(());
                }
                self.wait(cancel, None, async {
                    let room = writer.wait_for_capacity(PARTS_AT_ONCE);
                    moving(self.patience.silence, room).await?.map_err(explain)
                })?;
                writer.write(&buffer[..n]);
            }
        })();
        match sent {
            Ok(()) => self.wait(cancel, None, async {
                let rest = writer.finish();
                let limit = self.patience.silence * (PARTS_AT_ONCE as u32 + 1);
                moving(limit, rest).await?.map_err(explain)?;
                Ok(())
            }),
            Err(e) => {
                // Parts that stay behind cost money where they lie; try to take them away.
                let abort = async { writer.abort().await.map_err(explain) };
                let _ = self.small(&CancelToken::default(), abort);
                Err(e)
            }
        }
    }
}

/// `None` for what is not there.
fn present<T>(answer: object_store::Result<T>) -> Result<Option<T>, RemoteError> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(e) => Err(explain(e)),
    }
}

fn local(e: std::io::Error) -> RemoteError {
    RemoteError::Local(e.into())
}

fn explain(e: object_store::Error) -> RemoteError {
    use object_store::Error as E;
    match e {
        E::PermissionDenied { .. } => RemoteError::Denied(first_line("access denied", e)),
        E::Unauthenticated { .. } => RemoteError::Denied(first_line("not signed in", e)),
        e => RemoteError::Away(first_line("it does not work", e)),
    }
}

/// An error whose cause is one line: servers answer with pages of XML.
fn first_line(what: &str, e: object_store::Error) -> Error {
    let mut text = e.to_string();
    let mut source = std::error::Error::source(&e);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    let text: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let short: String = text.chars().take(300).collect();
    Error::new(format!("{what} ({short})"))
}

fn s3(
    bucket: &str,
    variables: impl IntoIterator<Item = (String, String)>,
    patience: Patience,
) -> Result<object_store::aws::AmazonS3> {
    // Only the first call in a process installs it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = AmazonS3Builder::new();
    let (mut endpoints, mut insecure) = (Vec::new(), false);
    for (name, value) in variables {
        // Variables of other AWS programs are none of these settings.
        let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() else { continue };
        match name.as_str() {
            "AWS_ENDPOINT" | "AWS_ENDPOINT_URL" | "AWS_ENDPOINT_URL_S3" => {
                endpoints.push(value.clone());
            }
            "AWS_ALLOW_HTTP" => insecure = value.eq_ignore_ascii_case("true"),
            name if !name.starts_with("AWS_") => continue,
            _ => {}
        }
        builder = builder.with_config(key, value);
    }
    let loopback = !endpoints.is_empty() && endpoints.iter().all(|e| is_loopback(e));
    let options = ClientOptions::new()
        .with_connect_timeout(patience.connect)
        .with_read_timeout(patience.silence)
        // It would bound whole transfers, whatever their size.
        .with_timeout_disabled()
        .with_allow_http(insecure || loopback);
    let retry = RetryConfig {
        backoff: BackoffConfig { init_backoff: Duration::from_millis(200), ..Default::default() },
        max_retries: 3,
        retry_timeout: patience.answer,
    };
    let built =
        builder.with_bucket_name(bucket).with_client_options(options).with_retry(retry).build();
    built.map_err(|e| {
        Error::new(format!("the remote cache `s3://{bucket}` cannot be set up"))
            .with_source(e)
            .with_hint("see the `AWS_*` variables in docs/ci.md")
    })
}

/// Whether traffic to an endpoint stays on this machine, so that it may go unencrypted.
fn is_loopback(endpoint: &str) -> bool {
    match Url::parse(endpoint).ok().as_ref().and_then(Url::host) {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(ip)) => IpAddr::from(ip).is_loopback(),
        Some(Host::Ipv6(ip)) => IpAddr::from(ip).is_loopback(),
        None => false,
    }
}

/// A folder. It is made if the one above it exists: where a disk is not mounted nothing is made.
fn folder_at(folder: &FilePath) -> Result<LocalFileSystem> {
    if !folder.is_dir() {
        fs_err::create_dir(folder).map_err(|e| {
            Error::new("the folder of the remote cache cannot be made")
                .with_source(e)
                .with_hint("the folder above it must exist; is the disk mounted?")
        })?;
    }
    LocalFileSystem::new_with_prefix(folder).map_err(|e| {
        Error::new(format!("the remote cache `{}` cannot be used", folder.display())).with_source(e)
    })
}
