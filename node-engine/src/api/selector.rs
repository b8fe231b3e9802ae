//! How a person names instances: `web`, `web#0`, `app.default.web.default#0`, or the whole `app.default.web.default.instance.0`.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use crate::model::{InstanceId, ServiceName};

/// A name as typed, of a service or one of its instances.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector {
    name: Name,
    pub number: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    Full(ServiceName),
    /// The third part of a service's name.
    Short(String),
}

/// A text that names nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} names no instance or service: write web, web#0 or app.default.web.default#0")]
pub struct InvalidSelector(String);

/// Why a name does not lead to one service.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unresolved {
    Nothing,
    /// The services that share the short name.
    Ambiguous(Vec<ServiceName>),
}

impl Selector {
    /// The full or the short name, as typed.
    pub(super) fn name(&self) -> String {
        match &self.name {
            Name::Full(service) => service.to_string(),
            Name::Short(short) => short.clone(),
        }
    }

    /// The one service that is meant, among the services of `known`. A full name needs no such service to exist.
    pub(super) fn service<'a>(
        &self,
        known: impl IntoIterator<Item = &'a ServiceName>,
    ) -> Result<ServiceName, Unresolved> {
        let short = match &self.name {
            Name::Full(service) => return Ok(service.clone()),
            Name::Short(short) => short,
        };
        let matching: BTreeSet<_> = known.into_iter().filter(|service| service.short() == short).collect();
        match Vec::from_iter(matching).as_slice() {
            [] => Err(Unresolved::Nothing),
            [one] => Ok((*one).clone()),
            many => Err(Unresolved::Ambiguous(many.iter().map(|service| (*service).clone()).collect())),
        }
    }
}

impl FromStr for Selector {
    type Err = InvalidSelector;

    fn from_str(text: &str) -> Result<Self, InvalidSelector> {
        let invalid = || InvalidSelector(text.chars().take(160).collect());
        if let Ok(instance) = text.parse::<InstanceId>() {
            return Ok(Self { name: Name::Full(instance.service), number: Some(instance.number) });
        }
        let (name, number) = match text.split_once('#') {
            Some((name, number)) => (name, Some(number.parse().map_err(|_| invalid())?)),
            None => (text, None),
        };
        if let Ok(service) = name.parse() {
            return Ok(Self { name: Name::Full(service), number });
        }
        if name.is_empty() || name.len() > 30 || !name.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(invalid());
        }
        Ok(Self { name: Name::Short(name.to_owned()), number })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Name::Full(service) => write!(f, "{service}")?,
            Name::Short(short) => f.write_str(short)?,
        }
        self.number.map_or(Ok(()), |number| write!(f, "#{number}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_every_form() {
        for (text, shown) in [
            ("web", "web"),
            ("web#3", "web#3"),
            ("app.default.web.default", "app.default.web.default"),
            ("app.default.web.default#0", "app.default.web.default#0"),
            ("app.default.web.default.instance.12", "app.default.web.default#12"),
        ] {
            assert_eq!(text.parse::<Selector>().map(|selector| selector.to_string()), Ok(shown.to_owned()));
        }
        for bad in ["", "#1", "web#", "web#x", "web#-1", "a.b", "we b", "web#1#2", "../x", "web.instance.0"] {
            assert!(bad.parse::<Selector>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_short_name_means_the_one_service_that_has_it() {
        let known: Vec<ServiceName> =
            ["a.x.web.y", "b.x.web.y", "a.x.db.y", "a.x.db.y"].iter().map(|name| name.parse().unwrap()).collect();
        let resolve = |text: &str| text.parse::<Selector>().unwrap().service(&known);
        assert_eq!(resolve("db"), Ok(known[2].clone()));
        assert_eq!(resolve("web"), Err(Unresolved::Ambiguous(vec![known[0].clone(), known[1].clone()])));
        assert_eq!(resolve("cache"), Err(Unresolved::Nothing));
        assert_eq!(resolve("c.x.web.y#1").map(|service| service.to_string()), Ok("c.x.web.y".to_owned()));
    }
}
