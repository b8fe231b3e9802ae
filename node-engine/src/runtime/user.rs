//! Users and groups by name or number, from files in the format of passwd(5) and group(5): no name service is asked, since a static
//! binary has none.

use std::fs;

/// The accounts of the node, or of an image.
#[derive(Clone, Debug)]
pub(super) struct Accounts {
    pub(super) passwd: String,
    pub(super) groups: String,
    /// Where they are, for messages.
    pub(super) place: &'static str,
    /// The group of a number that is nobody's; `None`: the same number.
    pub(super) lone_group: Option<u32>,
}

impl Accounts {
    pub(super) fn of_node() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self { passwd: read("/etc/passwd"), groups: read("/etc/group"), place: "on this node", lone_group: None }
    }

    /// `user` or `user:group`.
    pub(super) fn resolve(&self, text: &str) -> Result<(u32, u32), String> {
        let (name, group) = match text.split_once(':') {
            Some((name, group)) => (name, Some(group)),
            None => (text, None),
        };
        let place = self.place;
        let (user, own) = self.find_user(name).ok_or_else(|| format!("there is no user {name:?} {place}"))?;
        let group = match group {
            Some(group) => find(group, &self.groups).ok_or_else(|| format!("there is no group {group:?} {place}"))?,
            None => own,
        };
        Ok((user, group))
    }

    /// Groups that list this user as a member.
    pub(super) fn memberships(&self, user: u32) -> Vec<u32> {
        let Some((name, ..)) = entries(&self.passwd).find(|(_, id, _)| *id == user) else { return Vec::new() };
        let lists =
            |line: &str| line.rsplit(':').next().is_some_and(|members| members.split(',').any(|one| one == name));
        entries(&self.groups).filter(|(.., line)| lists(line)).map(|(_, id, _)| id).collect()
    }

    /// The superuser and nobody are known also where no file names them.
    fn find_user(&self, name: &str) -> Option<(u32, u32)> {
        let number = find(name, &self.passwd).or(match name {
            "root" => Some(0),
            "nobody" => Some(65_534),
            _ => None,
        })?;
        let group = entries(&self.passwd)
            .find_map(|(_, id, line)| (id == number).then(|| line.split(':').nth(3)?.parse().ok())?);
        Some((number, group.or(self.lone_group.filter(|_| name != "nobody")).unwrap_or(number)))
    }
}

fn find(name: &str, file: &str) -> Option<u32> {
    let named = entries(file).find_map(|(entry, id, _)| (entry == name).then_some(id));
    named.or_else(|| name.parse().ok())
}

/// Name, number and whole line of each entry.
fn entries(file: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    file.lines().filter_map(|line| {
        let mut fields = line.split(':');
        Some((fields.next()?, fields.nth(1)?.parse().ok()?, line))
    })
}

/// Accounts of an image, and who is asked for in the first line, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(text: &str) {
    let (user, passwd) = text.split_once('\n').unwrap_or((text, ""));
    for lone_group in [None, Some(0)] {
        let accounts = Accounts { passwd: passwd.into(), groups: passwd.into(), place: "there", lone_group };
        if let Ok((user, _)) = accounts.resolve(user) {
            assert!(accounts.memberships(user).len() <= passwd.lines().count());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts(lone_group: Option<u32>) -> Accounts {
        let passwd = "root:x:0:0::/:/bin/sh\nweb:x:1000:100:w:/:/bin/sh\nbroken\n".into();
        let groups = "root:x:0:\naudio:x:29:web,other\nvideo:x:44:web\nwww:x:33:\n".into();
        Accounts { passwd, groups, place: "here", lone_group }
    }

    #[test]
    fn users_are_names_or_numbers() {
        for (name, expected, in_an_image) in [
            ("web", Some((1000, 100)), Some((1000, 100))),
            ("1000", Some((1000, 100)), Some((1000, 100))),
            ("77", Some((77, 77)), Some((77, 0))),
            ("root", Some((0, 0)), Some((0, 0))),
            ("nobody", Some((65_534, 65_534)), Some((65_534, 65_534))),
            ("web:www", Some((1000, 33)), Some((1000, 33))),
            ("broken", None, None),
            ("web:broken", None, None),
            ("", None, None),
        ] {
            assert_eq!(accounts(None).resolve(name).ok(), expected, "{name}");
            assert_eq!(accounts(Some(0)).resolve(name).ok(), in_an_image, "{name}");
        }
        assert_eq!(accounts(None).resolve("root:7"), Ok((0, 7)));
        let error = accounts(None).resolve("root:no-such-group").expect_err("there is none");
        assert_eq!(error, "there is no group \"no-such-group\" here");
    }

    #[test]
    fn memberships_are_by_name() {
        assert_eq!(accounts(None).memberships(1000), [29, 44]);
        assert_eq!(accounts(None).memberships(77), [] as [u32; 0]);
    }
}
