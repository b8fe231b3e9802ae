//! What `upgrade --check` shows.

use super::table::list;
use crate::api::dto::upgrade::Upgrade;

pub(super) fn text(upgrade: &Upgrade) -> String {
    let running = upgrade.running.clone().unwrap_or_else(|| "no daemon answers: what it has left is looked at".into());
    let layout = &upgrade.layout;
    let tables = match &layout.pinned {
        None => format!("none are pinned; {} would be", layout.own),
        Some(pinned) if *pinned == layout.own => format!("{pinned}, and stays"),
        Some(pinned) => format!("{pinned} becomes {}; flows are taken over", layout.own),
    };
    let mut pairs = vec![
        ("this version", upgrade.version.clone()),
        ("running", running),
        ("datapath", upgrade.datapath.clone().unwrap_or_default()),
        ("tables", tables),
    ];
    pairs.extend(layout.changes.iter().map(|change| ("", change.clone())));
    for program in &upgrade.programs {
        let why = if program.reason.is_empty() { String::new() } else { format!(": {}", program.reason) };
        pairs.push(("program", format!("{} {}{why}", program.name, program.change)));
    }
    pairs.extend(upgrade.settings.iter().map(|setting| ("setting", setting.clone())));
    pairs.push(("store", upgrade.store.clone()));
    pairs.push(("hitless", if upgrade.hitless { "yes".into() } else { "no".into() }));
    pairs.extend(upgrade.hindrances.iter().map(|hindrance| ("because", hindrance.clone())));
    list(&pairs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::dto::upgrade::{Layout, Program};

    #[test]
    fn what_changes_and_why_it_is_not_hitless_is_said() {
        let upgrade = Upgrade {
            version: "0.2.0".into(),
            running: Some("0.1.0".into()),
            datapath: Some("ebpf".into()),
            layout: Layout { pinned: Some("v3".into()), own: "v4".into(), changes: vec!["FLOWS: with spare".into()] },
            programs: vec![Program { name: "tc_veth_ingress".into(), change: "refused".into(), reason: "no".into() }],
            store: "as this version writes it".into(),
            hindrances: vec!["tc_veth_ingress is refused: no".into()],
            ..Upgrade::default()
        };
        let text = text(&upgrade);
        for line in [
            "v3 becomes v4; flows are taken over",
            "FLOWS: with spare",
            "tc_veth_ingress refused: no",
            "hitless       no",
            "because       tc_veth_ingress is refused: no",
        ] {
            assert!(text.contains(line), "{line}:\n{text}");
        }
    }
}
