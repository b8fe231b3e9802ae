//! What would change if this program took over from the one that runs here, or from what that has left. Changes nothing.

use std::path::Path;

use super::checks::CheckError;
use crate::api::client::Client;
use crate::api::dto::upgrade::{Layout, Program, Upgrade};
use crate::config::{Config, ConfigError, DatapathChoice, Loaded};
use crate::netmanager::datapath::{Change, Outlook, outlook};
use crate::netmanager::pin_dir;
use crate::store::Store;

/// Looks at everything that a start would find. `loaded`: what this program makes of the configuration.
///
/// # Errors
/// If the caller may not look.
pub async fn upgrade(loaded: Result<Loaded, ConfigError>, socket: &Path) -> anyhow::Result<Upgrade> {
    if !nix::unistd::geteuid().is_root() {
        anyhow::bail!(CheckError::NotRoot);
    }
    let mut upgrade = Upgrade { version: env!("CARGO_PKG_VERSION").to_owned(), ..Upgrade::default() };
    let running = match Client::new(socket) {
        Ok(client) => client.status().await.ok(),
        Err(_) => None,
    };
    if let Some(status) = &running {
        upgrade.running = Some(status.version.clone());
        upgrade.datapath = status.network.as_ref().map(|network| network.datapath.clone());
    }
    match loaded {
        Ok(Loaded { config, warnings }) => {
            upgrade.settings = warnings;
            look(&mut upgrade, config).await?;
        }
        Err(error) => {
            upgrade.hindrances.push(format!("it does not start with this configuration: {error}"));
            upgrade.settings.push(error.to_string());
        }
    }
    upgrade.hitless = upgrade.hindrances.is_empty();
    Ok(upgrade)
}

async fn look(upgrade: &mut Upgrade, config: Config) -> anyhow::Result<()> {
    match Store::look(&config.state_dir) {
        Ok(words) => upgrade.store = words.into(),
        Err(error) => {
            upgrade.store = error.to_string();
            upgrade.hindrances.push(format!("it does not start: {error}"));
        }
    }
    let (pins, capacity) = (pin_dir(&config.network), config.network.instances);
    let seen = tokio::task::spawn_blocking(move || outlook(&pins, capacity)).await?;
    let of_tun = upgrade.datapath.as_deref() == Some("tun") || config.network.datapath == DatapathChoice::Tun;
    if of_tun {
        upgrade.hindrances.push("packets wait for a moment while TUN is taken over: no program carries them".into());
    }
    layout(upgrade, seen, of_tun);
    Ok(())
}

fn layout(upgrade: &mut Upgrade, seen: Outlook, of_tun: bool) {
    if seen.rows.is_none() {
        upgrade.hindrances.push("the rows that are pinned are not described: flows begin anew".into());
    }
    for (name, change) in seen.programs {
        let (change, reason) = match change {
            Change::Same => ("same", String::new()),
            Change::Replaced => ("replaced", String::new()),
            Change::New => ("new", String::new()),
            Change::Refused(reason) => ("refused", reason),
        };
        if change == "refused" && !of_tun && seen.pinned.is_some() {
            upgrade.hindrances.push(format!("{name} is refused: {reason}"));
        }
        upgrade.programs.push(Program { name: name.to_owned(), change: change.to_owned(), reason });
    }
    if seen.pinned.is_none() && upgrade.running.is_some() && !of_tun {
        upgrade.hindrances.push("nothing is pinned that could go on meanwhile".into());
    }
    upgrade.layout = Layout { pinned: seen.pinned, own: seen.own, changes: seen.rows.unwrap_or_default() };
}
