//! A pod's containers, run from its manifest as kubelet and a container runtime would: `cargo xtask guest-contained` is the
//! runtime, and here is kubelet's part.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Container, PodSpec};
use serde_json::Value;
use tempfile::TempDir;
use test_apiserver::TlsListener;

use crate::common::Agent;
use crate::deploy;

/// Where a pod finds its service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// What the account's token is.
pub(crate) const TOKEN: &str = "the-token-of-the-service-account";

/// A pod on `node-a`.
pub(crate) struct Pod {
    spec: PodSpec,
    config_maps: BTreeMap<String, BTreeMap<String, String>>,
    dir: TempDir,
    seccomp: Option<PathBuf>,
}

impl Pod {
    /// The pod of a `DaemonSet`, with the `ConfigMaps` among some objects, in the cluster of an API server.
    pub(crate) fn new(daemon_set: &Value, objects: &[Value], server: &TlsListener) -> Self {
        let daemon_set: DaemonSet = serde_json::from_value(daemon_set.clone()).unwrap();
        Self::with_spec(daemon_set.spec.unwrap().template.spec.unwrap(), objects, server)
    }

    /// A pod by itself.
    pub(crate) fn single(pod: &Value, server: &TlsListener) -> Self {
        Self::with_spec(serde_json::from_value(pod["spec"].clone()).unwrap(), &[], server)
    }

    fn with_spec(spec: PodSpec, objects: &[Value], server: &TlsListener) -> Self {
        let config_maps = objects.iter().filter(|object| object["kind"] == "ConfigMap").map(|object| {
            let data = serde_json::from_value(object["data"].clone()).unwrap();
            (object["metadata"]["name"].as_str().unwrap().to_owned(), data)
        });
        let profile = spec.security_context.as_ref().and_then(|context| context.seccomp_profile.as_ref()).unwrap();
        let seccomp = match profile.type_.as_str() {
            "Localhost" => Some(deploy().join("seccomp").join(profile.localhost_profile.as_ref().unwrap())),
            // The runtime's own is not known here.
            _ => None,
        };
        let pod = Self { config_maps: config_maps.collect(), spec, dir: TempDir::new().unwrap(), seccomp };
        let account = pod.dir.path().join("account");
        fs::create_dir(&account).unwrap();
        // With the certificate and the token of the API server.
        server.write_kubeconfig(&account, TOKEN);
        fs::write(account.join("namespace"), "kube-system").unwrap();
        fs::write(pod.dir.path().join("hosts"), "127.0.0.1 localhost control-plane.example\n").unwrap();
        let names: Vec<String> = pod.config_maps.keys().cloned().collect();
        for name in names {
            pod.publish(&name);
        }
        pod
    }

    /// Loads another profile than the manifest says.
    pub(crate) fn set_seccomp(&mut self, profile: PathBuf) {
        self.seccomp = Some(profile);
    }

    /// A directory for whatever the pod needs.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The address of the API server.
    pub(crate) fn server(&self) -> SocketAddr {
        let kubeconfig = fs::read_to_string(self.dir.path().join("account/kubeconfig")).unwrap();
        let kubeconfig: Value = serde_json::from_str(&kubeconfig).unwrap();
        let url = kubeconfig["clusters"][0]["cluster"]["server"].as_str().unwrap();
        url.strip_prefix("https://").unwrap().parse().unwrap()
    }

    /// Changes a key of a `ConfigMap`, which its files follow.
    pub(crate) fn configure(&mut self, config_map: &str, key: &str, change: impl FnOnce(&str) -> String) {
        let value = self.config_maps.get_mut(config_map).unwrap().get_mut(key).unwrap();
        *value = change(value);
        self.publish(config_map);
    }

    /// Writes a `ConfigMap` as kubelet does: a new directory, and a link to it that is swapped.
    fn publish(&self, name: &str) {
        let dir = self.dir.path().join("volumes").join(name);
        fs::create_dir_all(&dir).unwrap();
        let version = format!("..{}", fs::read_dir(&dir).unwrap().count());
        fs::create_dir(dir.join(&version)).unwrap();
        for (key, value) in &self.config_maps[name] {
            fs::write(dir.join(&version).join(key), value).unwrap();
            let link = dir.join(key);
            if !link.is_symlink() {
                symlink(Path::new("..data").join(key), link).unwrap();
            }
        }
        symlink(version, dir.join("..new")).unwrap();
        fs::rename(dir.join("..new"), dir.join("..data")).unwrap();
    }

    fn container(&self, name: &str) -> &Container {
        let mut all = self.spec.init_containers.iter().flatten().chain(&self.spec.containers);
        all.find(|container| container.name == name).unwrap()
    }

    /// Starts a container.
    pub(crate) fn start(&self, name: &str) -> Agent {
        Agent::start_command(&mut self.command(name))
    }

    /// Runs a container of the start, which must succeed; its log.
    pub(crate) fn run(&self, name: &str) -> String {
        let mut container = self.start(name);
        assert!(container.ends().success(), "{name}: {}", container.log());
        container.log()
    }

    /// What the image executes, by its own account.
    fn entrypoint() -> String {
        let text = fs::read_to_string(deploy().join("Containerfile")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("ENTRYPOINT ")).unwrap();
        serde_json::from_str::<Vec<String>>(line).unwrap().remove(0)
    }

    fn command(&self, name: &str) -> Command {
        let container = self.container(name);
        let context = container.security_context.as_ref().unwrap();
        let env = self.environment(container);
        let mut command = Command::new(needed("KUBE_IPVS_XTASK"));
        command.env_clear().envs(&env);
        command.arg("guest-contained").arg("--image").arg(needed("KUBE_IPVS_IMAGE"));
        let mut mount = |source: &Path, target: &str| {
            command.arg("--mount").arg(format!("{}:{target}", source.display()));
        };
        mount(&self.dir.path().join("hosts"), "/etc/hosts");
        mount(&self.dir.path().join("account"), SERVICE_ACCOUNT);
        for volume_mount in container.volume_mounts.iter().flatten() {
            let mut volumes = self.spec.volumes.iter().flatten();
            let volume = volumes.find(|volume| volume.name == volume_mount.name).unwrap();
            if let Some(config_map) = &volume.config_map {
                mount(&self.dir.path().join("volumes").join(&config_map.name), &volume_mount.mount_path);
            }
        }
        if context.read_only_root_filesystem == Some(true) {
            command.arg("--read-only");
        }
        if context.privileged == Some(true) {
            command.arg("--privileged");
        } else if let Some(profile) = &self.seccomp {
            command.arg("--seccomp").arg(profile);
        }
        if context.allow_privilege_escalation == Some(false) {
            command.arg("--no-new-privileges");
        }
        let added = context.capabilities.iter().flat_map(|capabilities| capabilities.add.iter().flatten());
        command.args(added.flat_map(|name| ["--capability", name]));
        command.arg("--");
        match &container.command {
            Some(words) => command.args(words.iter().map(|word| expanded(word, &env))),
            None => command.arg(Self::entrypoint()),
        };
        command.args(container.args.iter().flatten().map(|word| expanded(word, &env)));
        command
    }

    fn environment(&self, container: &Container) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        for source in container.env_from.iter().flatten() {
            all.extend(self.config_maps[&source.config_map_ref.as_ref().unwrap().name].clone());
        }
        for variable in container.env.iter().flatten() {
            let field = variable.value_from.as_ref().and_then(|source| source.field_ref.as_ref()).unwrap();
            assert_eq!(field.field_path, "spec.nodeName");
            all.insert(variable.name.clone(), "node-a".to_owned());
        }
        all
    }
}

/// `$(NAME)` for the variables of the container.
fn expanded(word: &str, env: &BTreeMap<String, String>) -> String {
    env.iter().fold(word.to_owned(), |word, (name, value)| word.replace(&format!("$({name})"), value))
}

/// What `cargo xtask test` says in the environment.
pub(crate) fn needed(name: &str) -> OsString {
    std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: run these tests by `cargo xtask test`"))
}
