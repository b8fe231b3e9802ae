//! A closer look at instances, and what happens on the node.

use clap::Args;

use super::ask::dash;
use super::table::{bytes, list, percent, table, time};
use super::watch::{Repeat, Screen, print, show};
use crate::api::Selector;
use crate::api::client::{Client, Following};
use crate::api::dto::look::{Event, EventsQuery, Inspection, Runtime, Usage};

/// What happens on this node.
#[derive(Clone, Debug, Args)]
pub(super) struct EventsArgs {
    /// Go on with what happens from now on
    #[arg(long, short)]
    follow: bool,
    /// How many of those before
    #[arg(long, value_name = "N")]
    past: Option<usize>,
    /// Print JSON, one document a line
    #[arg(long)]
    json: bool,
}

impl EventsArgs {
    pub(super) async fn run(self, client: &Client) -> anyhow::Result<()> {
        let query = EventsQuery { past: self.past, follow: self.follow };
        let mut following = client.events(&query).await?;
        let mut rest = Vec::new();
        while let Some(piece) = following.next().await? {
            rest.extend_from_slice(&piece);
            let Some(end) = rest.iter().rposition(|byte| *byte == b'\n') else { continue };
            let lines: Vec<u8> = rest.drain(..=end).collect();
            let text = if self.json { lines } else { events(&lines).into_bytes() };
            if !print(&text)? {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Lines as they come, so no column can be as wide as its widest cell.
fn events(lines: &[u8]) -> String {
    let known = lines.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Event>(line).ok());
    let line = |event: Event| {
        let detail = if event.detail.is_empty() { String::new() } else { format!("  {}", event.detail) };
        list(&[(&time(event.time_ms), format!("{:<14} {}{detail}", event.event, event.subject))])
    };
    known.map(line).collect()
}

/// Prints an answer that goes on, until it ends or the reader has had enough.
pub(super) async fn follow(mut following: Following) -> anyhow::Result<()> {
    while let Some(piece) = following.next().await? {
        if !print(&piece)? {
            break;
        }
    }
    Ok(())
}

pub(super) async fn stats(client: &Client, instance: Option<Selector>, repeat: Repeat) -> anyhow::Result<()> {
    // A name is settled once, by the daemon, with its words where it means nothing.
    let one = match &instance {
        Some(instance) => {
            let known = client.inspect(instance).await?;
            Some(format!("{}#{}", known.service, known.number))
        }
        None => None,
    };
    let ask = async || {
        let mut known = client.stats().await?;
        known.retain(|usage| one.as_ref().is_none_or(|one| usage.instance == *one));
        known.sort_by(|left, right| left.instance.cmp(&right.instance));
        Ok(known)
    };
    show::<Vec<Usage>, _>(repeat, ask).await
}

impl Screen for Vec<Usage> {
    fn screen(&self, before: Option<(&Self, f64)>) -> String {
        let row = |usage: &Usage| {
            let then = before.and_then(|(then, seconds)| {
                Some((then.iter().find(|other| other.instance == usage.instance)?, seconds))
            });
            let moved = |value: fn(&Usage) -> Option<u64>| {
                let total = value(usage);
                let rate = then.and_then(|(then, seconds)| {
                    Some(format!(" ({}/s)", bytes((total?.saturating_sub(value(then)?) as f64 / seconds) as u64)))
                });
                total.map_or_else(|| "-".into(), |total| format!("{}{}", bytes(total), rate.unwrap_or_default()))
            };
            [
                usage.instance.clone(),
                format!("{:.1}%", usage.cpu_percent),
                match usage.memory_limit_bytes {
                    Some(limit) => format!("{} of {}", bytes(usage.memory_bytes), bytes(limit)),
                    None => bytes(usage.memory_bytes),
                },
                percent(usage.memory_percent),
                moved(|usage| usage.received_bytes),
                moved(|usage| usage.sent_bytes),
                moved(|usage| usage.read_bytes),
                moved(|usage| usage.written_bytes),
                usage.processes.map_or_else(|| "-".into(), |number| number.to_string()),
            ]
        };
        let rows: Vec<_> = self.iter().map(row).collect();
        table(["INSTANCE", "CPU", "MEMORY", "MEM%", "RECEIVED", "SENT", "READ", "WRITTEN", "PROCESSES"], &rows)
    }
}

pub(super) fn inspection(known: &Inspection) -> String {
    let restarts = if known.restarts == 0 { String::new() } else { known.restarts.to_string() };
    let mut pairs = vec![
        ("instance", format!("{}#{}", known.service, known.number)),
        ("state", with(&known.state, &known.detail)),
        ("restarts", restarts),
        ("technology", known.technology.clone()),
        ("image", with(&known.image, &known.image_id)),
        ("platform", known.platform.clone()),
        ("job", known.job.clone()),
        ("addresses", joined(&[known.address_v4.clone(), known.address_v6.clone()])),
        ("ports", joined(&known.ports)),
        ("limits", limits(known)),
    ];
    match &known.runtime {
        Some(runtime) => pairs.extend(of_runtime(runtime)),
        None => pairs.push(("runtime", known.runtime_error.clone())),
    }
    pairs.extend(known.usage.iter().flat_map(of_usage));
    list(&pairs)
}

fn limits(known: &Inspection) -> String {
    let limits = [
        known.limits.vcpus.map(|vcpus| format!("{vcpus} CPUs")),
        known.limits.memory_mib.map(|memory| bytes(memory << 20)),
        (known.limits.vgpus > 0).then(|| format!("{} GPUs", known.limits.vgpus)),
        known.privileged.then(|| "privileged".into()),
    ];
    let limits: Vec<String> = limits.into_iter().flatten().collect();
    if limits.is_empty() { "none".into() } else { limits.join(", ") }
}

fn of_runtime(runtime: &Runtime) -> Vec<(&'static str, String)> {
    let ended = match runtime.exit_code {
        Some(code) => with(&runtime.ended, &format!("exit code {code}")),
        None => String::new(),
    };
    vec![
        ("id", runtime.handle.clone()),
        ("pid", runtime.pid.map(|pid| pid.to_string()).unwrap_or_default()),
        ("command", runtime.command.join(" ")),
        ("environment", joined(&runtime.environment)),
        ("user", runtime.user.clone()),
        ("directory", runtime.working_directory.clone()),
        ("devices", joined(&runtime.devices)),
        ("gpus", joined(&runtime.gpus)),
        ("mounts", joined(&runtime.mounts)),
        ("created", runtime.created.clone()),
        ("started", runtime.started.clone()),
        ("ended", ended),
    ]
}

fn of_usage(usage: &Usage) -> Vec<(&'static str, String)> {
    let known = |number: Option<u64>| number.map_or_else(|| "-".into(), bytes);
    let seconds = usage.cpu_seconds.map(|seconds| format!(", {seconds:.1} s in all")).unwrap_or_default();
    let peak = usage.memory_peak_bytes.map(|peak| format!(", {} at most", bytes(peak))).unwrap_or_default();
    vec![
        ("cpu", format!("{:.1}% of this machine{seconds}", usage.cpu_percent)),
        ("memory", format!("{}{peak}", bytes(usage.memory_bytes))),
        ("processes", usage.processes.map(|number| number.to_string()).unwrap_or_default()),
        ("network", format!("{} received, {} sent", known(usage.received_bytes), known(usage.sent_bytes))),
        ("disk", format!("{} read, {} written", known(usage.read_bytes), known(usage.written_bytes))),
        ("layer", bytes(usage.disk_bytes)),
    ]
}

fn with(what: &str, more: &str) -> String {
    if more.is_empty() { dash(what) } else { format!("{} ({more})", dash(what)) }
}

fn joined(words: &[String]) -> String {
    words.iter().filter(|word| !word.is_empty()).cloned().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stats_say_how_fast_things_move() {
        let usage = |received| Usage {
            instance: "a.b.web.c#0".into(),
            cpu_percent: 12.34,
            memory_bytes: 3 << 20,
            memory_limit_bytes: Some(64 << 20),
            received_bytes: Some(received),
            processes: Some(2),
            ..Usage::default()
        };
        let text = vec![usage(3072)].screen(Some((&vec![usage(1024)], 2.0)));
        let row: Vec<&str> =
            text.lines().nth(1).unwrap().split("  ").filter(|cell| !cell.is_empty()).map(str::trim).collect();
        assert_eq!(
            row,
            ["a.b.web.c#0", "12.3%", "3.0 MiB of 64.0 MiB", "0%", "3.0 KiB (1.0 KiB/s)", "-", "-", "-", "2"],
            "{text}"
        );
    }

    #[test]
    fn an_inspection_leaves_out_what_there_is_not() {
        let known = Inspection {
            service: "a.b.web.c".into(),
            state: "failed".into(),
            detail: "exit code 3".into(),
            image: "bb:1".into(),
            technology: "docker".into(),
            runtime_error: "a.b.web.c.instance.0 is unknown to the runtime".into(),
            ..Inspection::default()
        };
        assert_eq!(
            inspection(&known),
            "instance    a.b.web.c#0\n\
             state       failed (exit code 3)\n\
             technology  docker\n\
             image       bb:1\n\
             limits      none\n\
             runtime     a.b.web.c.instance.0 is unknown to the runtime\n"
        );
    }

    #[test]
    fn events_are_a_line_each_and_steer_no_terminal() {
        let event = Event {
            time_ms: 0,
            subject: "web#0".into(),
            event: "failed".into(),
            detail: "\u{1b}[31m".into(),
            ..Event::default()
        };
        let line = serde_json::to_vec(&event).unwrap();
        let text = events(&[line.as_slice(), b"\n", line.as_slice()].concat());
        assert_eq!(text.lines().count(), 2);
        assert!(text.contains("failed         web#0  \u{fffd}[31m"), "{text}");
    }
}
