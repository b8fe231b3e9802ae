//! Which known word was probably meant.

/// The candidate with the fewest edits to `word`. A key in the wrong table is as near as its last part is.
pub(super) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .min_by_key(|candidate| distance(word, candidate).min(distance(last(word), last(candidate)) + 1))
}

fn last(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// Levenshtein's distance. Words longer than any key are not compared in full.
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (index, from) in left.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = index + 1;
        for (column, to) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(row[column] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_errors_lead_to_what_was_meant() {
        let keys = ["cluster.host", "cluster.port", "network.datapath", "network.tunnel_port", "state_dir"];
        for (typed, meant) in [
            ("cluster.hots", "cluster.host"),
            ("network.datpath", "network.datapath"),
            ("datapath", "network.datapath"),
            ("network.tunnelport", "network.tunnel_port"),
            ("statedir", "state_dir"),
        ] {
            assert_eq!(nearest(typed, keys), Some(meant), "{typed}");
        }
        assert_eq!(nearest("x", []), None);
    }
}
