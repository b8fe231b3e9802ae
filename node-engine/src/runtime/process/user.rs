//! Users and groups by name or number, from the node's own files: no name service is asked, since a static binary has none.

use std::fs;

/// `user` or `user:group`. The group of a user that is a mere number is the same number.
pub(super) fn resolve(text: &str) -> Result<(u32, u32), String> {
    let (name, group) = match text.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (text, None),
    };
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let (user, own) = find_user(name, &passwd).ok_or_else(|| format!("there is no user {name:?} on this node"))?;
    let group = match group {
        Some(group) => find(group, &groups).ok_or_else(|| format!("there is no group {group:?} on this node"))?,
        None => own,
    };
    Ok((user, group))
}

/// The superuser and nobody are known also where no file names them.
fn find_user(name: &str, passwd: &str) -> Option<(u32, u32)> {
    let number = find(name, passwd).or(match name {
        "root" => Some(0),
        "nobody" => Some(65_534),
        _ => None,
    })?;
    let group =
        entries(passwd).find_map(|(_, id, line)| (id == number).then(|| line.split(':').nth(3)?.parse().ok())?);
    Some((number, group.unwrap_or(number)))
}

fn find(name: &str, file: &str) -> Option<u32> {
    let named = entries(file).find_map(|(entry, id, _)| (entry == name).then_some(id));
    named.or_else(|| name.parse().ok())
}

/// Name, number and whole line of each entry (passwd(5), group(5)).
fn entries(file: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    file.lines().filter_map(|line| {
        let mut fields = line.split(':');
        Some((fields.next()?, fields.nth(1)?.parse().ok()?, line))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_names_or_numbers() {
        let passwd = "root:x:0:0::/:/bin/sh\nweb:x:1000:100:w:/:/bin/sh\nbroken\n";
        for (name, expected) in [
            ("web", Some((1000, 100))),
            ("1000", Some((1000, 100))),
            ("77", Some((77, 77))),
            ("root", Some((0, 0))),
            ("nobody", Some((65_534, 65_534))),
            ("broken", None),
            ("", None),
        ] {
            assert_eq!(find_user(name, passwd), expected, "{name}");
        }
        assert!(resolve("root:no-such-group").is_err());
        assert_eq!(resolve("root:7"), Ok((0, 7)));
    }
}
