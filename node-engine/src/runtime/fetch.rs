//! Images that are one file, from the web, kept: one that is pinned by its digest is never asked for again, another is asked for anew each time and sent
//! only where it has changed. A server that is away does not keep a node from running what it has.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use nix::fcntl::OFlag;
use reqwest::header::{ETAG, HeaderValue, IF_NONE_MATCH};
use reqwest::{Client, Response, StatusCode};
use ring::digest::{Context, SHA256, digest};
use tokio::task::spawn_blocking;

use super::RuntimeError;

/// No image is larger.
const LARGEST: u64 = 1 << 30;
/// What all kept images of one kind together may fill.
const KEPT: u64 = 4 << 30;
const CONNECT: Duration = Duration::from_secs(10);
/// So long after the last byte nobody downloads any more.
const CUT_SHORT: Duration = Duration::from_secs(3600);
/// Without a byte for so long a download is over.
const SILENCE: Duration = Duration::from_secs(30);

/// Downloads under way have names of their own.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// An image as it was asked for.
#[derive(Debug, PartialEq, Eq)]
struct Source<'a> {
    place: Place<'a>,
    /// SHA-256 in hexadecimal digits.
    digest: Option<&'a str>,
}

#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Web(&'a str),
    File(&'a Path),
}

/// Where the image lies on this node, having been fetched and checked. `suffix` is that of all that is kept in `cache`.
///
/// # Errors
/// `Refused` for what no node takes, or this one does not; `Image` where it cannot be had or is not what was pinned.
pub(super) async fn image(image: &str, cache: &Path, files: bool, suffix: &str) -> Result<PathBuf, RuntimeError> {
    let source = source(image).map_err(|reason| RuntimeError::Refused { what: "image", reason })?;
    let failed = |reason: String| RuntimeError::Image { image: image.to_owned(), reason };
    let url = match source.place {
        Place::File(_) if !files => {
            let reason = "this node takes no images from its own files (runtime.image_files)".into();
            return Err(RuntimeError::Refused { what: "image", reason });
        }
        Place::File(path) => {
            return check(path, source.digest).await.map(|()| path.to_owned()).map_err(failed);
        }
        Place::Web(url) => url,
    };
    fs::create_dir_all(cache).map_err(|error| failed(error.to_string()))?;
    let key = source.digest.map_or_else(|| hexadecimal(digest(&SHA256, url.as_bytes()).as_ref()), str::to_owned);
    let kept = cache.join(format!("{key}.{suffix}"));
    if source.digest.is_some() && check(&kept, source.digest).await.is_ok() {
        touch(&kept);
        return Ok(kept);
    }
    match download(url, &kept, source.digest).await {
        Ok(()) => {}
        Err(reason) if source.digest.is_none() && kept.exists() => {
            tracing::warn!(url, reason, "the image cannot be asked for anew; the one that is here is used");
        }
        Err(reason) => return Err(failed(reason)),
    }
    touch(&kept);
    prune(cache, &kept, KEPT);
    Ok(kept)
}

fn source(image: &str) -> Result<Source<'_>, String> {
    let (place, fragment) = image.split_once('#').map_or((image, None), |(place, fragment)| (place, Some(fragment)));
    let digest = match fragment {
        None => None,
        Some(fragment) => {
            let digest = fragment.strip_prefix("sha256=").or_else(|| fragment.strip_prefix("sha256:"));
            let whole = |digest: &&str| digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
            Some(digest.filter(whole).ok_or_else(|| format!("{fragment:?} is not sha256=<64 hexadecimal digits>"))?)
        }
    };
    if place.contains(',') {
        return Err("it names several images; arch has to say which is for which machine".into());
    }
    if let Some(path) = place.strip_prefix("file://") {
        if path.starts_with('/') {
            return Ok(Source { place: Place::File(Path::new(path)), digest });
        }
        return Err(format!("{place:?} is not file:///an/absolute/path"));
    }
    if place.starts_with("https://") || place.starts_with("http://") {
        return Ok(Source { place: Place::Web(place), digest });
    }
    Err(format!("{place:?} is not the URL of an image (https://…, http://…)"))
}

/// Fetches the image unless the one that is here is still the same.
async fn download(url: &str, kept: &Path, digest: Option<&str>) -> Result<(), String> {
    // An error means that one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = || Client::builder().connect_timeout(CONNECT).read_timeout(SILENCE);
    let client = match client().build() {
        Ok(client) => client,
        // Small machines have no roots of trust, and this needs none.
        Err(_) if url.starts_with("http://") => client().tls_certs_only([]).build().map_err(|error| chain(&error))?,
        Err(error) => return Err(format!("{} (are CA certificates installed?)", chain(&error))),
    };
    let mark = beside(kept, "etag");
    let mut request = client.get(url);
    if let (true, Some(tag)) = (kept.exists(), known_tag(&mark)) {
        request = request.header(IF_NONE_MATCH, tag);
    }
    let response = request.send().await.map_err(|error| chain(&error))?;
    match response.status() {
        StatusCode::NOT_MODIFIED => return Ok(()),
        status if !status.is_success() => return Err(format!("the server says {status}")),
        _ => {}
    }
    if let Some(length) = response.content_length().filter(|length| *length > LARGEST) {
        return Err(format!("it has {length} bytes; no more than {LARGEST} are taken"));
    }
    let tag = response.headers().get(ETAG).cloned();
    let part = beside(kept, &format!("part{}", NEXT.fetch_add(1, Ordering::Relaxed)));
    let received = match receive(response, &part).await {
        Ok(found) if digest.is_none_or(|digest| digest.eq_ignore_ascii_case(&found)) => Ok(()),
        Ok(found) => Err(format!("its digest is sha256={found}, not the one that is asked for")),
        Err(reason) => Err(reason),
    };
    let placed = received.and_then(|()| fs::rename(&part, kept).map_err(|error| error.to_string()));
    if placed.is_err() {
        // The reason is what counts.
        let _ = fs::remove_file(&part);
    } else {
        let _ = match tag {
            Some(tag) => fs::write(&mark, tag.as_bytes()),
            None => fs::remove_file(&mark),
        };
    }
    placed
}

/// Writes the body to the file; gives its digest.
async fn receive(mut response: Response, to: &Path) -> Result<String, String> {
    let mut file = File::create(to).map_err(|error| error.to_string())?;
    let (mut context, mut length) = (Context::new(&SHA256), 0);
    while let Some(chunk) = response.chunk().await.map_err(|error| chain(&error))? {
        length += chunk.len() as u64;
        if length > LARGEST {
            return Err(format!("it is longer than {LARGEST} bytes"));
        }
        context.update(&chunk);
        file.write_all(&chunk).map_err(|error| error.to_string())?;
    }
    Ok(hexadecimal(context.finish().as_ref()))
}

/// A file that is no larger than is taken, and whose digest is the one asked for, if one is. Reading it may take seconds.
async fn check(path: &Path, digest: Option<&str>) -> Result<(), String> {
    let (path, digest) = (path.to_owned(), digest.map(str::to_owned));
    let checked = spawn_blocking(move || check_now(&path, digest.as_deref(), LARGEST)).await;
    checked.unwrap_or_else(|error| Err(error.to_string()))
}

fn check_now(path: &Path, digest: Option<&str>, largest: u64) -> Result<(), String> {
    // Whoever names a pipe would have to be waited for; a file opens the same.
    let file = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
    let file = file.map_err(|error| error.to_string())?;
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("it is not a regular file".into());
    }
    let too_large = |length: u64| format!("it has {length} bytes; no more than {largest} are taken");
    if metadata.len() > largest {
        return Err(too_large(metadata.len()));
    }
    let Some(digest) = digest else { return Ok(()) };
    // It may grow while it is read.
    let (found, length) = digest_of(file.take(largest + 1)).map_err(|error| error.to_string())?;
    if length > largest {
        return Err(too_large(length));
    }
    if found.eq_ignore_ascii_case(digest) {
        Ok(())
    } else {
        Err(format!("its digest is sha256={found}, not the one that is asked for"))
    }
}

/// And how many bytes it is of.
fn digest_of(mut file: impl Read) -> io::Result<(String, u64)> {
    let (mut context, mut buffer, mut total) = (Context::new(&SHA256), vec![0; 64 * 1024], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((hexadecimal(context.finish().as_ref()), total)),
            length => {
                context.update(&buffer[..length]);
                total += length as u64;
            }
        }
    }
}

fn known_tag(mark: &Path) -> Option<HeaderValue> {
    HeaderValue::from_bytes(&fs::read(mark).ok()?).ok()
}

/// The least recently used go first.
fn touch(path: &Path) {
    // A cache that cannot be ordered is pruned in another order.
    let _ = File::options().append(true).open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

/// Removes what was not used for longest until the rest fits, and what a download that was cut short has left.
fn prune(cache: &Path, keep: &Path, limit: u64) {
    let files: Vec<_> = fs::read_dir(cache).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    let (parts, files): (Vec<_>, Vec<_>) = files.into_iter().partition(|path| is_part(path));
    for part in parts {
        let written = fs::metadata(&part).and_then(|file| file.modified());
        // One that goes on is written to all the while.
        if written.is_ok_and(|written| written.elapsed().is_ok_and(|silence| silence > CUT_SHORT)) {
            let _ = fs::remove_file(&part);
        }
    }
    let mut known: Vec<_> = files
        .into_iter()
        .filter(|path| path != keep && path.extension() == keep.extension())
        .filter_map(|path| fs::metadata(&path).ok().map(|file| (file.modified().ok(), file.len(), path)))
        .collect();
    known.sort();
    let mut total: u64 = known.iter().map(|(_, length, _)| length).sum();
    total += fs::metadata(keep).map_or(0, |file| file.len());
    for (_, length, path) in known {
        if total <= limit {
            return;
        }
        if fs::remove_file(&path).is_ok() {
            total -= length;
            let _ = fs::remove_file(beside(&path, "etag"));
        }
    }
}

/// Of a download that goes on, or did when the daemon was killed.
fn is_part(path: &Path) -> bool {
    path.extension().and_then(|extension| extension.to_str()).is_some_and(|extension| extension.starts_with("part"))
}

/// `<key>.tar.etag` for `<key>.tar.gz`, `<key>.etag` for `<key>.wasm`.
fn beside(kept: &Path, extension: &str) -> PathBuf {
    kept.with_extension(extension)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Everything an error says, its causes included.
fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Where an image is said to be, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(text: &str) {
    if let Ok(Source { place: Place::File(path), .. }) = source(text) {
        assert!(path.is_absolute());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::{Arc, Mutex};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    const DIGEST: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    /// Serves the text under the tag `"1"`, and notes the status of each answer.
    async fn server(text: &'static str) -> (String, Arc<Mutex<Vec<u16>>>, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/image.tar.gz", listener.local_addr().expect("an address"));
        let answers = Arc::new(Mutex::new(Vec::new()));
        let kept = answers.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok((mut stream, _)) = listener.accept().await else { return };
                let mut request = vec![0; 4096];
                let length = stream.read(&mut request).await.unwrap_or(0);
                let same = String::from_utf8_lossy(&request[..length]).to_lowercase().contains("if-none-match: \"1\"");
                let (status, body) = if same { (304, "") } else { (200, text) };
                kept.lock().expect("notes").push(status);
                let head = format!(
                    "HTTP/1.1 {status} X\r\nETag: \"1\"\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    body.len()
                );
                let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
            }
        });
        (url, answers, task)
    }

    #[tokio::test]
    async fn an_image_is_sent_once_and_outlives_its_server() {
        let (dir, (url, answers, server)) = (tempfile::tempdir().expect("a directory"), server("hello").await);
        for _ in 0..2 {
            let path = image(&url, dir.path(), false, "tar.gz").await.expect("fetched");
            assert_eq!(fs::read_to_string(path).expect("kept"), "hello");
        }
        let pinned = format!("{url}#sha256={DIGEST}");
        for _ in 0..2 {
            image(&pinned, dir.path(), false, "tar.gz").await.expect("fetched");
        }
        assert_eq!(*answers.lock().expect("notes"), [200, 304, 200], "what is pinned is not asked for again");
        server.abort();
        let _ = server.await;
        image(&url, dir.path(), false, "tar.gz").await.expect("the one that is here");
    }

    #[tokio::test]
    async fn what_is_not_what_was_asked_for_is_not_used() {
        let (dir, (url, _, _server)) = (tempfile::tempdir().expect("a directory"), server("hullo").await);
        let error = image(&format!("{url}#sha256={DIGEST}"), dir.path(), false, "tar.gz").await.expect_err("another");
        assert!(error.to_string().contains("its digest is sha256="), "{error}");
        assert_eq!(fs::read_dir(dir.path()).expect("a cache").count(), 0, "nothing of it stays");

        let file = dir.path().join("file");
        fs::write(&file, "hello").expect("write");
        let own = format!("file://{}", file.display());
        for (name, files, reason) in [
            (own.as_str(), false, "runtime.image_files"),
            ("ftp://host/x", true, "is not the URL"),
            ("https://host/x#sha256=12", true, "64 hexadecimal digits"),
            ("https://a/x,https://b/y", true, "several images"),
            ("file://relative", true, "absolute"),
            ("http://127.0.0.1:1/x", true, "refused"),
        ] {
            let error = image(name, dir.path(), files, "tar.gz").await.expect_err(name).to_string();
            assert!(error.contains(reason), "{name}: {error}");
        }
        assert_eq!(image(&format!("{own}#sha256={DIGEST}"), dir.path(), true, "tar.gz").await.expect("allowed"), file);
        fs::write(&file, "hullo").expect("write");
        assert!(image(&format!("{own}#sha256={DIGEST}"), dir.path(), true, "tar.gz").await.is_err());
    }

    #[tokio::test]
    async fn an_image_on_this_node_is_a_file_of_bounded_size() {
        let dir = tempfile::tempdir().expect("a directory");
        let (pipe, file) = (dir.path().join("pipe"), dir.path().join("file"));
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        for path in [&pipe, Path::new("/dev/zero"), dir.path()] {
            for suffix in [String::new(), format!("#sha256={DIGEST}")] {
                let name = format!("file://{}{suffix}", path.display());
                let checked = tokio::time::timeout(Duration::from_secs(20), image(&name, dir.path(), true, "wasm"));
                let error = checked.await.expect("it waits for nothing").expect_err("no file").to_string();
                assert!(error.contains("it is not a regular file"), "{error}");
            }
        }
        fs::write(&file, "hello").expect("write");
        assert_eq!(check_now(&file, Some(DIGEST), 5), Ok(()));
        for digest in [None, Some(DIGEST)] {
            let error = check_now(&file, digest, 4).expect_err("too large");
            assert_eq!(error, "it has 5 bytes; no more than 4 are taken");
        }
    }

    #[tokio::test]
    async fn a_digest_is_found_beside_everything_else() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("file");
        File::create(&file).and_then(|file| file.set_len(8 << 20)).expect("a file");
        // On the only thread of this test: were it read here, nothing else would be done meanwhile.
        let ticked = Arc::new(Mutex::new(0));
        let ticks = ticked.clone();
        let ticking = tokio::spawn(async move {
            loop {
                *ticks.lock().expect("a number") += 1;
                tokio::task::yield_now().await;
            }
        });
        assert!(check(&file, Some(DIGEST)).await.is_err(), "it is another");
        ticking.abort();
        assert!(*ticked.lock().expect("a number") > 0);
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, age) in [("a.tar.gz", 30), ("b.tar.gz", 10), ("c.tar.gz", 20)] {
            let path = dir.path().join(name);
            fs::write(&path, [0; 10]).expect("write");
            let file = File::options().append(true).open(&path).expect("open");
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).expect("a time");
        }
        prune(dir.path(), &dir.path().join("c.tar.gz"), 20);
        assert!(!dir.path().join("a.tar.gz").exists());
        assert!(dir.path().join("b.tar.gz").exists() && dir.path().join("c.tar.gz").exists());
    }
}
