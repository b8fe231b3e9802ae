//! Reads from a Rust source which paths it names, without a compiler: comments, literals and test modules are blanked, then
//! `use` trees and qualified paths are resolved against the module the file is.

/// A path the source names, as segments from the crate root (`crate::…`) or from an external crate.
pub(crate) type PathName = Vec<String>;

/// The code of a file that goes into the product: comments, strings and `mod tests` replaced by blanks of the same length.
pub(crate) fn product_code(source: &str) -> String {
    let mut code = blank_comments_and_literals(source);
    while let Some((start, end)) = test_module(&code) {
        let blanks: String = code[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        code.replace_range(start..end, &blanks);
    }
    code
}

/// Every path in the code, `crate`, `self` and `super` resolved. `module` is the file's own path below the crate root.
pub(crate) fn paths(code: &str, module: &[&str]) -> Vec<PathName> {
    let tokens = tokens(code);
    let mut found = Vec::new();
    let mut at = 0;
    // Inline modules deepen what `super` and `self` mean: (depth of braces, name).
    let (mut depth, mut inline): (usize, Vec<(usize, &str)>) = (0, Vec::new());
    while at < tokens.len() {
        match tokens[at] {
            "{" => depth += 1,
            "}" => {
                depth = depth.saturating_sub(1);
                inline.retain(|(opened, _)| *opened < depth + 1);
            }
            "mod" if tokens.get(at + 2) == Some(&"{") => {
                inline.push((depth + 1, tokens[at + 1]));
                at += 1;
            }
            "use" => {
                let here: Vec<&str> = module.iter().copied().chain(inline.iter().map(|(_, name)| *name)).collect();
                let mut tree = Vec::new();
                at = use_tree(&tokens, at + 1, &mut Vec::new(), &mut tree);
                found.extend(tree.into_iter().map(|path| resolve(&path, &here)));
                continue;
            }
            first if starts_path(&tokens, at, first) => {
                let here: Vec<&str> = module.iter().copied().chain(inline.iter().map(|(_, name)| *name)).collect();
                let mut path = vec![first];
                while tokens.get(at + 1) == Some(&"::") && tokens.get(at + 2).is_some_and(|name| is_name(name)) {
                    path.push(tokens[at + 2]);
                    at += 2;
                }
                found.push(resolve(&path, &here));
            }
            _ => {}
        }
        at += 1;
    }
    found
}

fn starts_path(tokens: &[&str], at: usize, first: &str) -> bool {
    is_name(first) && tokens.get(at + 1) == Some(&"::") && (at == 0 || tokens[at - 1] != "::")
}

/// Collects the leaves of a `use` tree and returns where it ends.
fn use_tree<'a>(tokens: &[&'a str], mut at: usize, prefix: &mut Vec<&'a str>, found: &mut Vec<Vec<&'a str>>) -> usize {
    let length = prefix.len();
    while let Some(&token) = tokens.get(at) {
        match token {
            "::" => {}
            "{" => {
                at += 1;
                while tokens.get(at).is_some_and(|token| *token != "}") {
                    at = use_tree(tokens, at, prefix, found);
                    if tokens.get(at) == Some(&",") {
                        at += 1;
                    }
                }
                prefix.truncate(length);
                return at + 1;
            }
            "as" => at += 1,
            "*" => {}
            name if is_name(name) => prefix.push(name),
            _ => break,
        }
        at += 1;
    }
    if prefix.len() > length {
        found.push(prefix.clone());
    }
    prefix.truncate(length);
    at
}

fn resolve(path: &[&str], here: &[&str]) -> PathName {
    let mut base: Vec<&str> = Vec::new();
    let mut rest = path;
    match path.first().copied() {
        Some("crate") => rest = &path[1..],
        Some("self" | "super") => {
            base.extend(here);
            while let Some((first @ (&"self" | &"super"), tail)) = rest.split_first() {
                if *first == "super" {
                    base.pop();
                }
                rest = tail;
            }
        }
        _ => return path.iter().map(|segment| (*segment).to_owned()).collect(),
    }
    ["crate"].into_iter().chain(base).chain(rest.iter().copied()).map(str::to_owned).collect()
}

fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Names, `::` and single punctuation.
fn tokens(code: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = if first.is_alphanumeric() || first == '_' {
            rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        found.push(&rest[..length]);
        rest = rest[length..].trim_start();
    }
    found
}

/// The byte range of the first `#[cfg(test)] mod … { … }`.
fn test_module(code: &str) -> Option<(usize, usize)> {
    let mut from = 0;
    while let Some(found) = code[from..].find("#[cfg(test)]") {
        let start = from + found;
        let after = start + "#[cfg(test)]".len();
        let item = code[after..].trim_start();
        if item.starts_with("mod ") || item.starts_with("pub(crate) mod ") {
            let open = after + code[after..].find(['{', ';'])?;
            return Some((start, if code[open..].starts_with('{') { closing(code, open) } else { open + 1 }));
        }
        from = after;
    }
    None
}

fn closing(code: &str, open: usize) -> usize {
    let mut depth = 0;
    for (offset, byte) in code[open..].bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 1 => return open + offset + 1,
            b'}' => depth -= 1,
            _ => {}
        }
    }
    code.len()
}

fn blank_comments_and_literals(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(hashes) = raw_string(rest, code.chars().next_back()) {
            let end = format!("\"{}", "#".repeat(hashes));
            let open = rest.find('"').map_or(rest.len(), |quote| quote + 1);
            rest[open..].find(&end).map_or(rest.len(), |found| open + found + end.len())
        } else if first == '"' {
            quoted(rest, '"')
        } else if first == '\'' && is_char_literal(rest) {
            quoted(rest, '\'')
        } else {
            code.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        };
        code.extend(rest[..length].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = &rest[length..];
    }
    code
}

fn block_comment(text: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    let bytes = text.as_bytes();
    while at + 1 < bytes.len() {
        match &bytes[at..at + 2] {
            b"/*" => depth += 1,
            b"*/" => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// The number of hashes where the text begins a raw string.
fn raw_string(text: &str, before: Option<char>) -> Option<usize> {
    if before.is_some_and(|c| (c.is_alphanumeric() || c == '_') && c != 'b' && c != 'c') {
        return None;
    }
    let after = text.strip_prefix('r')?;
    let hashes = after.bytes().take_while(|&byte| byte == b'#').count();
    after[hashes..].starts_with('"').then_some(hashes)
}

fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + c.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

/// A character literal, not a lifetime.
fn is_char_literal(text: &str) -> bool {
    let mut rest = text.chars().skip(1);
    match rest.next() {
        Some('\\') => true,
        Some(_) => rest.next() == Some('\''),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_trees_and_qualified_paths_are_found() {
        let code = "use crate::model::{InstanceId, service::{Port, Limits as L}};\nuse super::link;\n\
                    use std::{fs, io::*};\nfn f() { self::inner::g(); serde_json::from_str(x); a.b::<C>(); }";
        let found = paths(code, &["netmanager", "actor"]);
        let texts: Vec<String> = found.iter().map(|path| path.join("::")).collect();
        assert_eq!(
            texts,
            [
                "crate::model::InstanceId",
                "crate::model::service::Port",
                "crate::model::service::Limits",
                "crate::netmanager::link",
                "std::fs",
                "std::io",
                "crate::netmanager::actor::inner::g",
                "serde_json::from_str",
                "b",
            ]
        );
    }

    #[test]
    fn super_counts_inline_modules() {
        let found = paths("mod inner { use super::super::wire; } use super::wire;", &["control", "mqtt"]);
        assert_eq!(found[0].join("::"), "crate::control::wire");
        assert_eq!(found[1].join("::"), "crate::control::wire");
    }

    #[test]
    fn comments_literals_and_tests_are_no_code() {
        let source = "/// crate::engine\nconst A: &str = \"crate::engine {\"; /* crate::a /* b */ crate::c */\n\
                      const B: &[u8] = br#\"crate::x \" {\"#; const C: char = '\\''; fn f<'a>(x: &'a u8) {}\n\
                      #[cfg(test)]\nmod tests { use crate::wire; fn g() { if true {} } }\nuse crate::model;";
        let code = product_code(source);
        assert_eq!(code.lines().count(), source.lines().count());
        assert_eq!(paths(&code, &[]), [["crate", "model"]]);
    }
}
