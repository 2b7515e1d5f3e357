//! Does: holds the files of scripts/deploy to the binary: it reads their flags, files and ports itself.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

#[path = "../../transport/tests/authority/mod.rs"]
mod authority;
mod running;

use authority::Authority;
use running::command;
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

fn deploy(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/deploy").join(name)).unwrap()
}

/// A folder with what `/etc/gradwire` would hold, and the configuration as it would be there.
fn installed(configuration: &str) -> (tempfile::TempDir, PathBuf) {
    let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
    let (cert, key) = authority.sign(&["ps.example"], 2200);
    std::fs::create_dir(folder.path().join("tls")).unwrap();
    for (from, to) in [(cert, "tls.crt"), (key, "tls.key"), (authority.ca(), "ca.crt")] {
        std::fs::copy(from, folder.path().join("tls").join(to)).unwrap();
    }
    let path = folder.path().join("configuration.toml");
    std::fs::write(&path, configuration.replace("/etc/gradwire", folder.path().to_str().unwrap())).unwrap();
    (folder, path)
}

/// A command of the binary takes the configuration, once it has a token.
fn assert_good(of: &str, path: &Path) {
    let mut checked = command(&["config", "--of", of, "--check", path.to_str().unwrap()]);
    let checked = checked.env("GRADWIRE_TOKEN", "x").output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

fn help(of: &str) -> String {
    String::from_utf8(command(&[of, "--help"]).output().unwrap().stdout).unwrap()
}

/// Flags in these words are flags that the command has which they begin with; that command.
fn assert_flags<'a>(words: impl IntoIterator<Item = &'a str>) -> &'a str {
    let mut words = words.into_iter();
    let of = words.next().unwrap();
    let (help, flags) = (help(of), words.filter(|word| word.starts_with("--")));
    let flags: Vec<&str> = flags.map(|flag| flag.split_once('=').map_or(flag, |(flag, _)| flag)).collect();
    assert!(flags.contains(&"--config"));
    for flag in flags {
        assert!(help.contains(&format!("{flag} <")), "{of} has no {flag}");
    }
    of
}

#[test]
fn the_configurations_are_such_that_servers_and_a_coordinator_start_with_them() {
    for (of, file) in [("serve", "ps.toml"), ("serve", "ps-cluster.toml"), ("coordinate", "coordinator.toml")] {
        let (_folder, path) = installed(&deploy(file));
        assert_good(of, &path);
    }
}

#[test]
fn the_services_of_systemd_call_the_binary_as_it_is() {
    for (name, of) in [("gradwire-ps.service", "serve"), ("gradwire-ps-coordinator.service", "coordinate")] {
        let unit = deploy(name).replace("\\\n", "");
        let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        let mut words = line.split_whitespace();
        assert_eq!(words.next(), Some("/usr/local/bin/gradwire-ps"));
        assert_eq!(assert_flags(words), of);
        for file in unit.split("${CREDENTIALS_DIRECTORY}/").skip(1).filter_map(|rest| rest.split_whitespace().next()) {
            assert!(unit.contains(&format!("LoadCredential={file}:/etc/gradwire/")), "nobody loads {file}");
        }
        // Where there is a systemd, it reads the unit too.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, unit.replace("/usr/local/bin/gradwire-ps", env!("CARGO_BIN_EXE_gradwire-ps"))).unwrap();
        if let Ok(verified) = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output() {
            let said = String::from_utf8_lossy(&verified.stderr);
            assert!(verified.status.success() && !said.contains(name), "{said}");
        }
    }
}

/// What a manifest of Kubernetes holds.
struct Manifest(Vec<Value>);

impl Manifest {
    fn of(file: &str) -> Self {
        let text = deploy(file);
        Self(serde_yaml_ng::Deserializer::from_str(&text).map(|one| Value::deserialize(one).unwrap()).collect())
    }

    fn named(&self, kind: &str, name: &Value) -> &Value {
        let found = self.0.iter().find(|document| document["kind"] == kind && document["metadata"]["name"] == *name);
        found.unwrap_or_else(|| panic!("there is no {kind} {name}"))
    }

    /// The pods of a set fit their service, their configuration and the binary; the command that they run, and its arguments.
    fn assert_fits(&self, set: &Value) -> (String, Vec<String>) {
        let (spec, pod) = (&set["spec"], &set["spec"]["template"]["spec"]);
        let service = self.named("Service", &spec["serviceName"]);
        let labels = &spec["template"]["metadata"]["labels"];
        assert_eq!((&spec["selector"]["matchLabels"], &service["spec"]["selector"]), (labels, labels));
        assert_eq!(pod["enableServiceLinks"], false, "variables that gradwire warns of");
        let container = &pod["containers"][0];
        let all = |key: &str| container[key].as_array().unwrap().iter();
        let arguments: Vec<&str> = all("args").map(|word| word.as_str().unwrap()).collect();
        let of = assert_flags(arguments.iter().copied());

        // Each file that is named lies in a volume that is mounted.
        let file = arguments[1 + arguments.iter().position(|word| *word == "--config").unwrap()];
        let mount = |file: &str| {
            let mount = all("volumeMounts").find(|mount| file.starts_with(mount["mountPath"].as_str().unwrap()));
            let mount = mount.unwrap_or_else(|| panic!("{file} is not mounted"));
            let volumes = pod["volumes"].as_array().unwrap();
            (mount, volumes.iter().find(|volume| volume["name"] == mount["name"]).unwrap())
        };
        let (mounted, volume) = mount(file);
        let config = self.named("ConfigMap", &volume["configMap"]["name"]);
        let configuration = config["data"][mounted["subPath"].as_str().unwrap()].as_str().unwrap();
        for file in configuration.split('"').filter(|word| word.starts_with('/')) {
            mount(file);
        }
        let (_folder, path) = installed(configuration);
        assert_good(of, &path);

        // The ports are those that it takes, and the probes ask at the admin port for paths that it answers.
        let ports: Vec<(&str, u64)> = all("ports")
            .map(|port| (port["name"].as_str().unwrap(), port["containerPort"].as_u64().unwrap()))
            .collect();
        let told = service["spec"]["ports"].as_array().unwrap().iter();
        let told: Vec<(&str, u64)> =
            told.map(|port| (port["name"].as_str().unwrap(), port["port"].as_u64().unwrap())).collect();
        assert_eq!(ports, told);
        let (admin, shards) = ports.split_last().unwrap();
        assert!(configuration.contains(&format!("admin = \"0.0.0.0:{}\"", admin.1)) && admin.0 == "admin");
        assert!(configuration.contains(&format!("listen = \"0.0.0.0:{}\"", shards[0].1)));
        let table: toml::Table = configuration.parse().unwrap();
        let wanted = if of == "serve" { table["shards"].as_integer().unwrap() as u64 } else { 1 };
        assert!((0..wanted).map(|n| shards[0].1 + n).eq(shards.iter().map(|port| port.1)), "{ports:?}");
        for (probe, path) in [("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")]
        {
            let asked = &container[probe]["httpGet"];
            assert_eq!((&asked["path"], &asked["port"]), (&path.into(), &"admin".into()));
        }
        let help = help(of);
        for variable in all("env").map(|variable| variable["name"].as_str().unwrap()) {
            let used = arguments.iter().any(|word| word.contains(&format!("$({variable})")));
            assert!(used || help.contains(variable), "{variable}");
        }
        (of.to_owned(), arguments.into_iter().map(str::to_owned).collect())
    }

    fn sets(&self) -> impl Iterator<Item = &Value> {
        self.0.iter().filter(|document| document["kind"] == "StatefulSet")
    }
}

#[test]
fn the_manifest_of_kubernetes_fits_together_and_calls_the_binary_as_it_is() {
    let manifest = Manifest::of("kubernetes.yaml");
    assert!(manifest.sets().map(|set| manifest.assert_fits(set).0).eq(["serve"]));
}

#[test]
fn the_manifest_of_a_cluster_has_servers_find_their_coordinator_and_copies_find_room() {
    let manifest = Manifest::of("kubernetes-cluster.yaml");
    let sets: Vec<_> = manifest.sets().map(|set| (set, manifest.assert_fits(set))).collect();
    let of = |name: &str| sets.iter().find(|(_, (of, _))| of == name).unwrap();
    let ((coordinating, _), (serving, (_, arguments))) = (of("coordinate"), of("serve"));
    let name = coordinating["metadata"]["name"].as_str().unwrap();
    // A pod's name, its set's service, and the port that it listens at.
    let address = format!("{name}-0.{name}.$(POD_NAMESPACE).svc.cluster.local:7000");
    assert!(arguments.contains(&format!("--coordinator={address}")), "{arguments:?}");
    let service = serving["spec"]["serviceName"].as_str().unwrap();
    let own = format!("--advertise=$(POD_NAME).{service}.$(POD_NAMESPACE).svc.cluster.local");
    assert!(arguments.contains(&own), "{arguments:?}");
    let config = manifest.0.iter().find(|document| document["kind"] == "ConfigMap").unwrap();
    let number = |file: &str, key: &str| {
        let table: toml::Table = config["data"][file].as_str().unwrap().parse().unwrap();
        table[key].as_integer().unwrap()
    };
    let servers = serving["spec"]["replicas"].as_i64().unwrap();
    let (seats, copies) = (number("ps.toml", "shards"), 1 + number("coordinator.toml", "replicas"));
    let wanted = number("coordinator.toml", "shards") * copies;
    // With one server away each shard still finds all its copies.
    assert!((servers - 1) * seats >= wanted && servers > copies, "{servers} servers of {seats} seats for {wanted}");
}
