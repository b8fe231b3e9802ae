//! QEMU's own protocol, as far as we speak it: one command, after which the guest is expected to end by itself.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// In the instance's directory, which is QEMU's working directory.
pub(super) const SOCKET: &str = "qmp.sock";
const ANSWER: Duration = Duration::from_secs(5);

/// Presses the guest's power button.
pub(super) async fn power_down(directory: &Path) -> io::Result<()> {
    let talk = async {
        // A socket's path has 108 bytes at most, which an instance's name alone may fill.
        let directory = File::open(directory)?;
        let path = format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd());
        let stream = UnixStream::connect(path).await?;
        let mut stream = BufReader::new(stream);
        answer(&mut stream, "\"QMP\"").await?;
        for command in ["qmp_capabilities", "system_powerdown"] {
            stream.write_all(format!("{{\"execute\":\"{command}\"}}\r\n").as_bytes()).await?;
            answer(&mut stream, "\"return\"").await?;
        }
        Ok(())
    };
    timeout(ANSWER, talk).await.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
}

/// Reads lines until one has the member; events come in between.
async fn answer(stream: &mut BufReader<UnixStream>, member: &str) -> io::Result<()> {
    let mut line = String::new();
    loop {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        if line.contains("\"error\"") {
            return Err(io::Error::other(line.trim().to_owned()));
        }
        if line.contains(member) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// Answers as QEMU does, with an event in between, and gives back what it was told.
    async fn qemu(listener: UnixListener, last: &str) -> Vec<String> {
        let (stream, _) = listener.accept().await.expect("a client");
        let mut stream = BufReader::new(stream);
        stream.write_all(b"{\"QMP\": {\"version\": {}}}\r\n").await.expect("greeting");
        let mut told = Vec::new();
        for answer in ["{\"return\": {}}", last] {
            let mut line = String::new();
            stream.read_line(&mut line).await.expect("a command");
            told.push(line.trim().to_owned());
            stream
                .write_all(format!("{{\"event\": \"RTC_CHANGE\"}}\r\n{answer}\r\n").as_bytes())
                .await
                .expect("answer");
        }
        told
    }

    #[tokio::test]
    async fn the_power_button_is_pressed_and_a_refusal_is_told() {
        // Longer than a socket's path may be.
        let dir = tempfile::tempdir().expect("a directory");
        let deep = dir.path().join("x".repeat(120));
        std::fs::create_dir(&deep).expect("a directory");
        for (last, good) in [("{\"return\": {}}", true), ("{\"error\": {\"desc\": \"no\"}}", false)] {
            let _ = std::fs::remove_file(deep.join(SOCKET));
            let open = File::open(&deep).expect("open");
            let path = format!("/proc/self/fd/{}/{SOCKET}", open.as_raw_fd());
            let server = tokio::spawn(qemu(UnixListener::bind(path).expect("bind"), last));
            assert_eq!(power_down(&deep).await.is_ok(), good);
            let told = server.await.expect("no panic");
            assert_eq!(told, ["{\"execute\":\"qmp_capabilities\"}", "{\"execute\":\"system_powerdown\"}"]);
        }
        assert!(power_down(dir.path()).await.is_err(), "nobody there");
    }
}
