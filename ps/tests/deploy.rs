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
    let path = folder.path().join("ps.toml");
    std::fs::write(&path, configuration.replace("/etc/gradwire", folder.path().to_str().unwrap())).unwrap();
    (folder, path)
}

/// The binary takes the configuration, once it has a token.
fn assert_good(path: &Path) {
    let checked = command(&["config", "--check", path.to_str().unwrap()]).env("GRADWIRE_TOKEN", "x").output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

/// Flags of `serve` in these words are flags that it has.
fn assert_flags<'a>(words: impl IntoIterator<Item = &'a str>) {
    let help = String::from_utf8(command(&["serve", "--help"]).output().unwrap().stdout).unwrap();
    let mut words = words.into_iter();
    assert_eq!(words.next(), Some("serve"));
    let flags: Vec<&str> = words.filter(|word| word.starts_with("--")).collect();
    assert!(flags.contains(&"--config"));
    for flag in flags {
        assert!(help.contains(&format!("{flag} <")), "serve has no {flag}");
    }
}

#[test]
fn the_configuration_is_one_that_a_server_starts_with() {
    let (_folder, path) = installed(&deploy("ps.toml"));
    assert_good(&path);
}

#[test]
fn the_service_of_systemd_calls_the_binary_as_it_is() {
    let unit = deploy("gradwire-ps.service").replace("\\\n", "");
    let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let mut words = line.split_whitespace();
    assert_eq!(words.next(), Some("/usr/local/bin/gradwire-ps"));
    assert_flags(words);
    for name in unit.split("${CREDENTIALS_DIRECTORY}/").skip(1).filter_map(|rest| rest.split_whitespace().next()) {
        assert!(unit.contains(&format!("LoadCredential={name}:/etc/gradwire/")), "nobody loads {name}");
    }
    // Where there is a systemd, it reads the unit too.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("gradwire-ps.service");
    std::fs::write(&path, unit.replace("/usr/local/bin/gradwire-ps", env!("CARGO_BIN_EXE_gradwire-ps"))).unwrap();
    if let Ok(verified) = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output() {
        let said = String::from_utf8_lossy(&verified.stderr);
        assert!(verified.status.success() && !said.contains("gradwire-ps.service"), "{said}");
    }
}

#[test]
fn the_manifest_of_kubernetes_fits_together_and_calls_the_binary_as_it_is() {
    let text = deploy("kubernetes.yaml");
    let documents = serde_yaml_ng::Deserializer::from_str(&text).map(|one| Value::deserialize(one).unwrap());
    let documents: Vec<Value> = documents.collect();
    let of_kind = |kind: &str| documents.iter().find(|document| document["kind"] == kind).unwrap();
    let (service, config, set) = (of_kind("Service"), of_kind("ConfigMap"), of_kind("StatefulSet"));
    let configuration = config["data"]["ps.toml"].as_str().unwrap();
    let (_folder, path) = installed(configuration);
    assert_good(&path);

    let (spec, pod) = (&set["spec"], &set["spec"]["template"]["spec"]);
    let labels = &spec["template"]["metadata"]["labels"];
    assert_eq!((&spec["selector"]["matchLabels"], &service["spec"]["selector"]), (labels, labels));
    assert_eq!(spec["serviceName"], service["metadata"]["name"]);
    let container = &pod["containers"][0];
    let arguments: Vec<&str> =
        container["args"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    assert_flags(arguments.iter().copied());

    // Each file that is named lies in a volume that is mounted.
    let mounts = container["volumeMounts"].as_array().unwrap();
    let named = configuration.split('"').filter(|word| word.starts_with('/'));
    for file in named.chain(arguments.iter().copied().filter(|word| word.starts_with('/'))) {
        let mount = mounts.iter().find(|mount| file.starts_with(mount["mountPath"].as_str().unwrap()));
        let mount = mount.unwrap_or_else(|| panic!("{file} is not mounted"));
        assert!(pod["volumes"].as_array().unwrap().iter().any(|volume| volume["name"] == mount["name"]));
    }
    // The ports are those that the server takes, and the probes ask at the admin port for paths that it answers.
    let port = |name: &str| {
        let ports = container["ports"].as_array().unwrap();
        ports.iter().find(|port| port["name"] == name).unwrap()["containerPort"].as_u64().unwrap()
    };
    assert!(configuration.contains(&format!("listen = \"0.0.0.0:{}\"", port("shard"))));
    assert!(configuration.contains(&format!("admin = \"0.0.0.0:{}\"", port("admin"))));
    for (probe, path) in [("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")] {
        assert_eq!(
            (&container[probe]["httpGet"]["path"], &container[probe]["httpGet"]["port"]),
            (&path.into(), &"admin".into())
        );
    }
    let help = String::from_utf8(command(&["serve", "--help"]).output().unwrap().stdout).unwrap();
    for variable in container["env"].as_array().unwrap() {
        assert!(help.contains(variable["name"].as_str().unwrap()), "{variable}");
    }
}
