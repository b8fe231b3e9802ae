//! Pages that name tests name tests that there are.

use std::fs;
use std::path::Path;

#[test]
fn the_page_on_job_documents_names_tests_that_there_are() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a checkout");
    let page = fs::read_to_string(root.join("docs/job-document.md")).expect("the page");
    let mut named = 0;
    for (file, test) in page.split('`').filter_map(|word| word.split_once(".rs::")) {
        let text =
            fs::read_to_string(root.join(format!("{file}.rs"))).unwrap_or_else(|error| panic!("{file}.rs: {error}"));
        assert!(text.contains(&format!("fn {test}(")), "{file}.rs has no {test}");
        named += 1;
    }
    assert!(named > 30, "{named}");
    // What the reader of documents asks for is on the page.
    let reader = fs::read_to_string(root.join("node-engine/src/wire/deploy.rs")).expect("the reader");
    for call in ["texts", "flag", "whole", "said"] {
        let call = format!("members.{call}(\"");
        let asked = reader.split(&call).skip(1).filter_map(|rest| rest.split('"').next());
        for member in asked {
            assert!(page.contains(&format!("`{member}`")) || OTHER_NAMES.contains(&member), "{member} is missing");
        }
    }
}

/// For `cmd` in the first generation, for `_id` in the common form.
const OTHER_NAMES: [&str; 2] = ["commands", "id"];
