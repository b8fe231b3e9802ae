//! JSON from outside, with its limits: size and depth are checked before anything is parsed, members nobody asked for are
//! skipped without being built, and a member of the wrong type says which one it was.

use std::collections::BTreeMap;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Longest message that carries one fact (a delete, an answer, an error).
pub const MAX_MESSAGE: usize = 64 * 1024;

/// Longest job document or table answer. They grow with a service: a job document carries every instance of the service
/// together with the history of its usage, so the limit of other messages would refuse what real clusters send. What is not
/// acted on is skipped, never built, so a long document costs no more than its own length.
pub const MAX_DOCUMENT: usize = 1024 * 1024;

/// Up to 2^53 every whole f64 is exact; nothing a cluster counts is larger.
pub(crate) const LARGEST_WHOLE: f64 = 9_007_199_254_740_992.0;

const MAX_DEPTH: usize = 32;
const MAX_MEMBERS: usize = 1024;
const EXCERPT: usize = 120;

/// Members whose values may be secrets, or hold some: of these an error says no more than what kind of value it is.
const SECRETS: [&str; 7] = ["added_files", "cmd", "commands", "config", "content", "environment", "volumes"];

/// Why a message was not understood.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    #[error("{size} bytes, and a message of this kind may have {limit}")]
    TooLong { size: usize, limit: usize },
    #[error("nested deeper than {MAX_DEPTH} levels")]
    TooDeep,
    #[error("not UTF-8 text")]
    NotText,
    #[error("not a JSON object: {0}")]
    NotAnObject(String),
    #[error("member `{0}` is missing")]
    Missing(&'static str),
    #[error("member `{member}` is not {expected}: {found}")]
    Member { member: &'static str, expected: &'static str, found: String },
}

/// The members of one JSON object. The last of several with one name counts; null counts as absent.
#[derive(Debug)]
pub(crate) struct Members<'a>(BTreeMap<String, &'a RawValue>);

impl<'a> Members<'a> {
    /// Checks the limits and takes the message apart.
    pub(crate) fn parse(bytes: &'a [u8], limit: usize) -> Result<Self, Malformed> {
        if bytes.len() > limit {
            return Err(Malformed::TooLong { size: bytes.len(), limit });
        }
        if depth(bytes) > MAX_DEPTH {
            return Err(Malformed::TooDeep);
        }
        Self::of(std::str::from_utf8(bytes).map_err(|_| Malformed::NotText)?)
    }

    fn of(text: &'a str) -> Result<Self, Malformed> {
        let mut parser = serde_json::Deserializer::from_str(text);
        let found = |error: serde_json::Error| match kind(text) {
            // What is wrong with an object is told without its values; what is another kind of value would be repeated.
            "an object" => Malformed::NotAnObject(error.to_string()),
            _ if !error.is_data() => Malformed::NotAnObject(error.to_string()),
            other => Malformed::NotAnObject(format!("it is {other}")),
        };
        let members = parser.deserialize_map(MembersVisitor).map_err(found)?;
        parser.end().map_err(found)?;
        Ok(members)
    }

    pub(crate) fn get(&self, member: &'static str) -> Option<&'a str> {
        self.0.get(member).map(|raw| raw.get()).filter(|text| *text != "null")
    }

    pub(crate) fn has(&self, member: &'static str) -> bool {
        self.get(member).is_some()
    }

    /// Present, and null.
    pub(crate) fn is_null(&self, member: &'static str) -> bool {
        self.0.get(member).is_some_and(|raw| raw.get() == "null")
    }

    fn read<T: serde::Deserialize<'a>>(
        &self,
        member: &'static str,
        expected: &'static str,
    ) -> Result<Option<T>, Malformed> {
        let Some(text) = self.get(member) else { return Ok(None) };
        serde_json::from_str(text).map(Some).map_err(|_| wrong(member, expected, text))
    }

    pub(crate) fn text(&self, member: &'static str) -> Result<Option<String>, Malformed> {
        self.read(member, "a text")
    }

    /// A text that says something: an empty one counts as absent.
    pub(crate) fn said(&self, member: &'static str) -> Result<Option<String>, Malformed> {
        Ok(self.text(member)?.filter(|text| !text.is_empty()))
    }

    pub(crate) fn flag(&self, member: &'static str) -> Result<bool, Malformed> {
        Ok(self.read(member, "true or false")?.unwrap_or(false))
    }

    pub(crate) fn texts(&self, member: &'static str) -> Result<Vec<String>, Malformed> {
        Ok(self.read(member, "a list of texts")?.unwrap_or_default())
    }

    /// A number without sign or fraction; as text too, since the same value is a number in one message and a text in another.
    pub(crate) fn whole(&self, member: &'static str) -> Result<Option<u64>, Malformed> {
        let expected = "a whole number";
        let Some(text) = self.get(member) else { return Ok(None) };
        if text.starts_with('"') {
            let inner: String = self.read(member, expected)?.unwrap_or_default();
            let number = inner.trim().parse();
            return number.map(Some).map_err(|_| wrong(member, expected, text));
        }
        let number: f64 = self.read(member, expected)?.unwrap_or_default();
        if !(0.0..=LARGEST_WHOLE).contains(&number) || number.fract() != 0.0 {
            return Err(wrong(member, expected, text));
        }
        Ok(Some(number as u64))
    }

    pub(crate) fn number(&self, member: &'static str) -> Result<Option<f64>, Malformed> {
        self.read(member, "a number")
    }

    pub(crate) fn object(&self, member: &'static str) -> Result<Option<Members<'a>>, Malformed> {
        self.get(member).map(Self::of).transpose()
    }

    /// All members, each of which is a text.
    pub(crate) fn entries(&self) -> Result<Vec<(String, String)>, Malformed> {
        let text = |(name, raw): (&String, &&RawValue)| match serde_json::from_str(raw.get()) {
            Ok(text) => Ok((name.clone(), text)),
            Err(_) => Err(wrong("config", "texts by name", raw.get())),
        };
        self.0.iter().map(text).collect()
    }

    /// The entries of a list of objects.
    pub(crate) fn objects(&self, member: &'static str) -> Result<Vec<Members<'a>>, Malformed> {
        let entries: Vec<&'a RawValue> = self.read(member, "a list")?.unwrap_or_default();
        entries.into_iter().map(|raw| Self::of(raw.get())).collect()
    }
}

fn wrong(member: &'static str, expected: &'static str, text: &str) -> Malformed {
    let found = if SECRETS.contains(&member) { format!("it is {}", kind(text)) } else { excerpt(text.as_bytes()) };
    Malformed::Member { member, expected, found }
}

/// What kind of JSON value this is, by its first character.
fn kind(text: &str) -> &'static str {
    match text.trim_start().as_bytes().first() {
        Some(b'{') => "an object",
        Some(b'[') => "a list",
        Some(b'"') => "a text",
        Some(b't' | b'f') => "true or false",
        Some(b'n') => "null",
        _ => "a number",
    }
}

struct MembersVisitor;

impl<'a> Visitor<'a> for MembersVisitor {
    type Value = Members<'a>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut map: M) -> Result<Members<'a>, M::Error> {
        let mut members = BTreeMap::new();
        while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
            if members.len() >= MAX_MEMBERS {
                return Err(serde::de::Error::custom("more members than any document has"));
            }
            members.insert(name, value);
        }
        Ok(Members(members))
    }
}

/// Deepest nesting of brackets outside texts, without parsing.
fn depth(bytes: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0usize, 0usize);
    let (mut in_text, mut escaped) = (false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            _ if in_text => {}
            b'{' | b'[' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// The beginning of something from outside, fit for a log line: short, and without a control character.
pub fn excerpt(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(EXCERPT)];
    let mut text = String::new();
    for letter in String::from_utf8_lossy(shown).chars() {
        match letter {
            '"' | '\'' => text.push(letter),
            other => text.extend(other.escape_debug()),
        }
    }
    if bytes.len() > EXCERPT {
        text.push_str("...");
    }
    text
}

/// At most `limit` bytes of `text`, cut between characters, keeping the beginning.
pub(crate) fn head(text: &str, limit: usize) -> &str {
    &text[..text.floor_char_boundary(limit)]
}

/// At most `limit` bytes of `text`, cut between characters, keeping the end.
pub(crate) fn tail(text: &str, limit: usize) -> &str {
    &text[text.ceil_char_boundary(text.len().saturating_sub(limit))..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_before_parsing() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(40), "]".repeat(40));
        assert!(matches!(Members::parse(deep.as_bytes(), MAX_MESSAGE), Err(Malformed::TooDeep)));
        let long = vec![b' '; MAX_MESSAGE + 1];
        assert!(matches!(Members::parse(&long, MAX_MESSAGE), Err(Malformed::TooLong { .. })));
        assert!(matches!(Members::parse(b"\xff{}", MAX_MESSAGE), Err(Malformed::NotText)));
        for text in ["", "[]", "3", "null", "{} {}", "{\"a\":}", "{\"a\":1,}"] {
            assert!(matches!(Members::parse(text.as_bytes(), MAX_MESSAGE), Err(Malformed::NotAnObject(_))), "{text}");
        }
        let many: String = (0..2000).map(|n| format!("\"{n}\":0,")).collect();
        assert!(Members::parse(format!("{{{many}\"x\":0}}").as_bytes(), MAX_MESSAGE).is_err());
    }

    #[test]
    fn brackets_in_texts_are_not_nesting() {
        let text = format!(r#"{{"a":"{}\"["}}"#, "[".repeat(100));
        assert_eq!(depth(text.as_bytes()), 1);
    }

    #[test]
    fn the_last_of_several_counts_and_null_is_absent() {
        let members = Members::parse(br#"{"a":1,"b":null,"a":2}"#, MAX_MESSAGE).unwrap();
        assert_eq!(members.whole("a").unwrap(), Some(2));
        assert!(!members.has("b"));
    }

    #[test]
    fn whole_numbers_come_as_numbers_or_texts() {
        for (text, expected) in
            [("3", Some(3)), ("3.0", Some(3)), ("\"3\"", Some(3)), ("null", None), ("1e3", Some(1000))]
        {
            let document = format!("{{\"n\":{text}}}");
            let members = Members::parse(document.as_bytes(), MAX_MESSAGE).unwrap();
            assert_eq!(members.whole("n").unwrap(), expected, "{text}");
        }
        for text in ["-1", "1.5", "\"x\"", "\"\"", "[]", "true", "1e300", "\"-1\""] {
            let document = format!("{{\"n\":{text}}}");
            let members = Members::parse(document.as_bytes(), MAX_MESSAGE).unwrap();
            assert!(members.whole("n").is_err(), "{text}");
        }
    }

    #[test]
    fn excerpts_are_short_and_printable() {
        assert_eq!(excerpt(b"a\n\x1b[31m"), r"a\n\u{1b}[31m");
        assert!(excerpt(&[0xff; 10_000]).len() < 500);
        assert_eq!(head("aä", 2), "a");
        assert_eq!(tail("äa", 2), "a");
    }
}
