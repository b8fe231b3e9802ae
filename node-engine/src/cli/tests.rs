//! What was typed → what it asks for.

use super::*;
use crate::cli::ask::Ask;

fn task(line: &str) -> Result<Task, String> {
    task_in(line, &Environment::new())
}

fn task_in(line: &str, environment: &Environment) -> Result<Task, String> {
    typed(line).and_then(|cli| cli.task(environment)).map_err(|error| error.to_string())
}

fn typed(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("node-engine").chain(line.split(' ').filter(|word| !word.is_empty())))
}

fn flags(line: &str) -> Vec<(&'static str, String)> {
    match task(line).unwrap() {
        Task::Daemon(sources) | Task::Standalone(sources, _) | Task::Uninstall { sources, .. } => {
            sources.flags.into_iter().map(|flag| (flag.key, flag.value)).collect()
        }
        other => panic!("{line:?} is {other:?}"),
    }
}

fn question(line: &str) -> Question {
    match task(line).unwrap() {
        Task::Ask(question) => question,
        other => panic!("{line:?} is {other:?}"),
    }
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn the_daemon_is_what_runs_without_a_command() {
    assert_eq!(flags(""), []);
    assert_eq!(flags("--cluster c:1 --datapath tun"), flags("run --cluster c:1 --datapath tun"));
    assert_eq!(flags("--cluster a run --cluster b"), [("cluster.host", "b".to_owned())]);
    assert!(matches!(task("--cluster c -vv --log debug"), Ok(Task::Daemon(_))));
}

#[test]
fn every_flag_sets_a_setting_that_exists() {
    let line = "--cluster c --generation g4 --name n --datapath tun --uplink e --public-ip 192.0.2.1 --tunnel-port 1 \
                --on-exit stop --state-dir /s --run-dir /r --docker-host unix:///d";
    let Task::Daemon(sources) = task(line).unwrap() else { panic!("not a daemon") };
    assert_eq!(sources.flags.len(), 11);
    let config = config::load(&sources).unwrap().config;
    assert_eq!(config.cluster.host, "c");
    assert_eq!(config.node_name, "n");
    assert_eq!(config.network.uplink.as_deref(), Some("e"));
    assert_eq!(config.network.tunnel_port, 1);
    assert_eq!(config.on_exit, crate::config::OnExit::Stop);
    assert_eq!((config.state_dir, config.run_dir), (PathBuf::from("/s"), PathBuf::from("/r")));
    assert_eq!(config.runtime.docker_host.as_deref(), Some("unix:///d"));
}

#[test]
fn a_standalone_cluster_has_the_reference_ports_unless_told() {
    let choice = |line: &str| match task(line) {
        Ok(Task::Standalone(_, choice)) => choice,
        other => panic!("{line:?} is {other:?}"),
    };
    let plain = choice("standalone");
    assert!(plain.node);
    assert_eq!((plain.http_port, plain.socketio_port, plain.broker_port), (10100, 10000, 10003));
    let other = choice("standalone --no-node --http-port 1 --broker [::1]:1883 --name x");
    assert_eq!((other.node, other.http_port, other.broker), (false, 1, Some(("::1".to_owned(), 1883))));
    assert!(task("standalone --broker h:1 --broker-port 2").is_err());
    assert!(task("standalone --broker nonsense").is_err());
}

#[test]
fn what_others_start_this_binary_for_is_understood() {
    let Ok(Task::KeepLog(file)) = task("keep-log /var/x.log") else { panic!("it is a task") };
    assert_eq!(file, PathBuf::from("/var/x.log"));
    assert!(matches!(task("supervise init /run/x"), Ok(Task::Supervise(stage, ..)) if stage == "init"));
}

#[test]
fn questions_go_to_the_socket_that_was_named() {
    let question = question("--socket /x/api.sock logs web#0 --tail 5");
    assert_eq!(question.socket, PathBuf::from("/x/api.sock"));
    let Ask::Logs { instance, tail, follow } = question.command else { panic!("not logs") };
    assert_eq!((instance.to_string(), tail, follow), ("web#0".to_owned(), Some(5), false));
}

/// A service and whoever asks or removes it mean the same node.
#[test]
fn what_the_environment_says_counts_for_every_command_until_something_else_is_typed() {
    let environment: Environment = [
        (CONFIG, "/dev/null"),
        (SOCKET, "/e/api.sock"),
        (LOG, "trace"),
        ("DOCKER_HOST", "unix:///e/docker.sock"),
        ("NODE_ENGINE_STATE_DIR", "/e/state"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    for line in ["", "run", "standalone", "uninstall", "upgrade --check"] {
        let (Task::Daemon(sources)
        | Task::Standalone(sources, _)
        | Task::Uninstall { sources, .. }
        | Task::Upgrade { sources, .. }) = task_in(line, &environment).unwrap()
        else {
            panic!("{line:?} has no configuration")
        };
        assert_eq!(sources.file.as_deref(), Some(Path::new("/dev/null")), "{line:?}");
        let config = config::load(&sources).unwrap().config;
        assert_eq!(config.runtime.docker_host.as_deref(), Some("unix:///e/docker.sock"), "{line:?}");
        assert_eq!(config.state_dir, PathBuf::from("/e/state"), "{line:?}");
    }
    let socket = |line: &str, environment: &Environment| match task_in(line, environment).unwrap() {
        Task::Ask(question) => question.socket,
        Task::Upgrade { socket, .. } => socket,
        other => panic!("{line:?} is {other:?}"),
    };
    assert_eq!(socket("status", &environment), PathBuf::from("/e/api.sock"));
    assert_eq!(socket("upgrade --check", &environment), PathBuf::from("/e/api.sock"));
    assert_eq!(socket("--socket /t/api.sock status", &environment), PathBuf::from("/t/api.sock"));
    // Set to nothing: not set.
    let unset = Environment::from([(SOCKET.to_owned(), String::new())]);
    assert_eq!(socket("--run-dir /x status", &unset), PathBuf::from("/x/api.sock"));
    // Also where it stands before the command.
    for line in ["--config /t.toml", "--config /t.toml run", "run --config /t.toml"] {
        let Ok(Task::Daemon(sources)) = task_in(line, &environment) else { panic!("{line:?} is no daemon") };
        assert_eq!(sources.file.as_deref(), Some(Path::new("/t.toml")), "{line:?}");
    }
    let log = |line: &str| typed(line).unwrap().log(&environment).filter;
    assert_eq!(log("status"), Some((Origin::Environment(LOG), "trace".to_owned())));
    assert_eq!(log("status --log info"), Some((Origin::Flag("--log"), "info".to_owned())));
    assert_eq!(log("status -v"), None);
}

#[test]
fn a_run_directory_is_where_its_socket_is() {
    assert_eq!(question("--run-dir /x status").socket, PathBuf::from("/x/api.sock"));
}

#[test]
fn deploy_takes_a_file_or_an_image_with_a_name() {
    let document = |line: &str| {
        let Ask::Deploy(args) = question(line).command else { panic!("not deploy") };
        serde_json::from_slice::<serde_json::Value>(&args.document().unwrap()).unwrap()
    };
    let made = document(
        "deploy --image nginx --name web --port 8080:80 --port 53:53/udp --env A=b --memory 64 --one-shot --cmd sh -c true",
    );
    assert_eq!(
        made,
        serde_json::json!({
            "job_name": "app.default.web.default", "virtualization": "container", "image": "nginx",
            "cmd": ["sh", "-c", "true"], "environment": ["A=b"], "port": "8080:80;53:53/udp", "memory": 64,
            "one_shot": true,
        })
    );
    assert_eq!(document("deploy --image i --name a.b.c.d")["job_name"], "a.b.c.d");

    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, br#"{"x":1}"#).unwrap();
    assert_eq!(document(&format!("deploy {}", file.path().display())), serde_json::json!({"x": 1}));

    for bad in [
        "deploy",
        "deploy --image i",
        "deploy f --image i --name n",
        "deploy --image i --name a.b",
        "deploy f --memory 1",
        "deploy f --replicas 0",
        "deploy f --replicas many",
    ] {
        assert!(task(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_overlay_is_looked_at_once_or_again_and_again() {
    for good in [
        "net flows",
        "net flows --service web --instance web#0 --limit 5 --json",
        "net services --watch --every 0.5",
        "net peers -w --json",
        "net drops --all",
    ] {
        assert!(matches!(question(good).command, Ask::Net(_)), "{good}");
    }
    for bad in ["net", "net flows --every 2", "net peers --watch --every 0", "net drops --watch --every nan", "net fly"]
    {
        assert!(task(bad).is_err(), "{bad}");
    }
}

#[test]
fn instances_are_looked_at_and_entered() {
    let Ask::Exec(args) = question("exec web#0 -- sh -c true").command else { panic!("not exec") };
    assert_eq!(args.command(), ["sh", "-c", "true"]);
    assert!(matches!(question("logs -f web").command, Ask::Logs { follow: true, .. }));
    assert!(matches!(question("inspect web --json").command, Ask::Inspect { json: true, .. }));
    assert!(matches!(question("stats").command, Ask::Stats { instance: None, .. }));
    assert!(matches!(question("stats web --watch --every 2").command, Ask::Stats { instance: Some(_), .. }));
    assert!(matches!(question("events --json --follow --past 3").command, Ask::Events(_)));
    for bad in ["exec web", "exec -- sh", "exec --tty --no-tty web -- sh", "inspect", "logs -f", "events --past -1"] {
        assert!(task(bad).is_err(), "{bad}");
    }
}

#[test]
fn what_cannot_be_meant_is_a_usage_error() {
    for bad in ["--cluster c status", "delete", "delete ../x", "replicate web", "replicate web -1", "move web#0", "fly"]
    {
        assert!(task(bad).is_err(), "{bad}");
    }
    assert!(matches!(task("version"), Ok(Task::Version)));
    assert!(matches!(task("uninstall --purge"), Ok(Task::Uninstall { purge: true, .. })));
}
