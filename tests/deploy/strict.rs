//! The manifests: understood field by field by the types of the API, complete, and asking for no more than is needed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, PodSpec, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use lab::seccomp::Profile;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::kustomize::{build, documents, find, kustomization, merge, without_directives};
use crate::{deploy, kubeadm};

/// The directories with a kustomization.
const KUSTOMIZATIONS: [&str; 4] = ["base", "overlays/new-cluster", "overlays/take-over-kubeadm", "components/seccomp"];

/// What of an object its type does not know, or would not write.
fn not_understood(object: &Value) -> Vec<String> {
    fn round_trip<T: DeserializeOwned + Serialize>(object: &Value) -> Result<Value, String> {
        let typed: T = serde_json::from_value(object.clone()).map_err(|error| error.to_string())?;
        serde_json::to_value(typed).map_err(|error| error.to_string())
    }
    let kind = (object["apiVersion"].as_str().unwrap_or_default(), object["kind"].as_str().unwrap_or_default());
    let understood = match kind {
        ("apps/v1", "DaemonSet") => round_trip::<DaemonSet>(object),
        ("v1", "ConfigMap") => round_trip::<ConfigMap>(object),
        ("v1", "Pod") => round_trip::<Pod>(object),
        ("v1", "ServiceAccount") => round_trip::<ServiceAccount>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => round_trip::<ClusterRole>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => round_trip::<ClusterRoleBinding>(object),
        _ => Err("no type is known for it".to_owned()),
    };
    let mut problems = Vec::new();
    match understood {
        Ok(understood) => compare(object, &understood, "", &mut problems),
        Err(problem) => problems.push(problem),
    }
    problems.into_iter().map(|problem| format!("{} {}: {problem}", kind.1, object["metadata"]["name"])).collect()
}

/// What is in `source` and not in `understood`, which may have empty fields besides.
fn compare(source: &Value, understood: &Value, path: &str, problems: &mut Vec<String>) {
    match (source, understood) {
        (Value::Object(source), Value::Object(understood)) => {
            for (name, value) in source {
                let path = format!("{path}.{name}");
                match understood.get(name) {
                    Some(understood) => compare(value, understood, &path, problems),
                    None => problems.push(format!("{path} is unknown")),
                }
            }
        }
        (Value::Array(source), Value::Array(understood)) if source.len() == understood.len() => {
            for (index, (source, understood)) in source.iter().zip(understood).enumerate() {
                compare(source, understood, &format!("{path}[{index}]"), problems);
            }
        }
        _ if source == understood => {}
        _ => problems.push(format!("{path} is {source} and is understood as {understood}")),
    }
}

/// All files below a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// A patch is not complete, but what it has must be right all the same.
fn as_object(mut patch: Value) -> Value {
    if patch["kind"].is_null() {
        patch["apiVersion"] = "apps/v1".into();
        patch["kind"] = "DaemonSet".into();
    }
    without_directives(patch)
}

#[test]
fn every_manifest_is_understood_field_by_field() {
    let mut count = 0;
    let manifests = files(&deploy()).into_iter().chain(files(&kubeadm()));
    let yaml = manifests.filter(|path| path.extension().is_some_and(|end| end == "yaml"));
    let mut problems = Vec::new();
    for path in yaml {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        // Those have types of their own elsewhere.
        let objects = match name.as_str() {
            "alerts.yaml" => continue,
            "kustomization.yaml" => {
                let dir = path.parent().unwrap();
                kustomization(dir).patches_in(dir)
            }
            _ => documents(&path),
        };
        for object in objects.into_iter().map(as_object) {
            count += 1;
            problems
                .extend(not_understood(&object).into_iter().map(|problem| format!("{}: {problem}", path.display())));
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
    assert!(count >= 15, "{count} objects");
}

#[test]
fn misspelt_fields_and_wrong_types_are_found() {
    let good = find(&build(&deploy().join("base"), &[]), "DaemonSet", "kube-ipvs").clone();
    assert_eq!(not_understood(&good), Vec::<String>::new());
    let with = |patch: Value| {
        let mut object = good.clone();
        merge(&mut object, patch, "");
        not_understood(&object)
    };
    let misspelt = with(json!({"spec": {"template": {"spec": {"hostNetworks": true}}}}));
    assert_eq!(misspelt, ["DaemonSet \"kube-ipvs\": .spec.template.spec.hostNetworks is unknown"]);
    assert_eq!(with(json!({"spec": {"template": {"spec": {"hostNetwork": "true"}}}})).len(), 1);
    let in_list =
        json!({"spec": {"template": {"spec": {"containers": [{"name": "kube-ipvs", "tty": true, "ty": 1}]}}}});
    assert_eq!(with(in_list).len(), 1);
    assert_eq!(not_understood(&json!({"apiVersion": "v1", "kind": "Secrets"})).len(), 1);
}

#[test]
fn kustomizations_list_exactly_the_files_beside_them() {
    for name in KUSTOMIZATIONS {
        let dir = deploy().join(name);
        let own = kustomization(&dir);
        let kind =
            if name.starts_with("components") { ("v1alpha1", "Component") } else { ("v1beta1", "Kustomization") };
        assert_eq!((own.api_version.rsplit('/').next().unwrap(), own.kind.as_str()), kind, "{name}");
        assert!(own.namespace.is_none_or(|namespace| namespace == "kube-system"), "{name}");
        assert!(own.images.iter().all(|image| image["name"] == image["newName"]), "{name}");
        let paths = own.patches.iter().filter_map(|patch| patch.path.as_ref());
        let named: BTreeSet<&str> = own.resources.iter().chain(paths).map(String::as_str).collect();
        let (elsewhere, here): (BTreeSet<&str>, BTreeSet<&str>) = named.iter().partition(|name| name.starts_with(".."));
        let found: BTreeSet<String> = fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "kustomization.yaml")
            .collect();
        assert_eq!(here, found.iter().map(String::as_str).collect(), "{name}");
        assert!(
            elsewhere
                .iter()
                .chain(&own.components.iter().map(String::as_str).collect::<Vec<_>>())
                .all(|path| dir.join(path).join("kustomization.yaml").is_file()),
            "{name}"
        );
    }
}

/// Where kubectl is installed, which these tests do not ask for.
#[test]
fn kubectl_builds_the_same() {
    for name in &KUSTOMIZATIONS[..3] {
        let dir = deploy().join(name);
        let Ok(output) = Command::new("kubectl").arg("kustomize").arg(&dir).output() else {
            eprintln!("there is no kubectl to compare with");
            return;
        };
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let theirs: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
        let ours = build(&dir, &[]);
        assert_eq!(theirs.len(), ours.len(), "{name}");
        for object in &ours {
            let name = object["metadata"]["name"].as_str().unwrap();
            assert_eq!(object, find(&theirs, object["kind"].as_str().unwrap(), name));
        }
    }
}

fn pod(dir: &str, components: &[&str]) -> PodSpec {
    let components: Vec<PathBuf> = components.iter().map(|name| deploy().join(name)).collect();
    let objects = build(&deploy().join(dir), &components);
    let daemon_set: DaemonSet = serde_json::from_value(find(&objects, "DaemonSet", "kube-ipvs").clone()).unwrap();
    daemon_set.spec.unwrap().template.spec.unwrap()
}

/// kubeadm's pod of kube-proxy, with the image of kube-ipvs.
fn swapped() -> PodSpec {
    let mut object = documents(&kubeadm().join("daemon-set.yaml")).remove(0);
    merge(&mut object, documents(&deploy().join("patches/kube-proxy-becomes-kube-ipvs.yaml")).remove(0), "");
    let daemon_set: DaemonSet = serde_json::from_value(object).unwrap();
    daemon_set.spec.unwrap().template.spec.unwrap()
}

/// The names of a pod's containers, first those of the start.
fn containers(pod: &PodSpec) -> Vec<&Container> {
    pod.init_containers.iter().flatten().chain(&pod.containers).collect()
}

#[test]
fn only_the_init_container_has_more_than_one_capability() {
    for (pod, names) in [
        (pod("base", &[]), &["init", "kube-ipvs"][..]),
        (pod("overlays/new-cluster", &[]), &["init", "kube-ipvs"]),
        (pod("overlays/take-over-kubeadm", &[]), &["init", "takeover", "kube-ipvs"]),
        (swapped(), &["init", "takeover", "kube-proxy"]),
    ] {
        let all = containers(&pod);
        assert_eq!(all.iter().map(|container| container.name.as_str()).collect::<Vec<_>>(), names);
        assert_eq!(pod.host_network, Some(true));
        for container in all {
            let context = container.security_context.as_ref().unwrap();
            assert_eq!(context.read_only_root_filesystem, Some(true), "{}", container.name);
            assert_eq!(container.image.as_deref(), Some("kube-ipvs:0.1.0"));
            assert_eq!(container.ports, None, "they would be reserved");
            if container.name == "init" {
                assert_eq!((context.privileged, &context.capabilities), (Some(true), &None));
                continue;
            }
            assert_eq!((context.privileged, context.allow_privilege_escalation), (Some(false), Some(false)));
            let capabilities = context.capabilities.as_ref().unwrap();
            assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]));
            assert_eq!(capabilities.add.as_deref(), Some(&["NET_ADMIN".to_owned()][..]));
        }
        let context = pod.security_context.as_ref().unwrap();
        // Only root gets capabilities that the executable does not bring.
        assert_eq!(context.run_as_user, Some(0));
        assert_eq!(context.seccomp_profile.as_ref().unwrap().type_, "RuntimeDefault");
    }
}

#[test]
fn the_seccomp_component_replaces_the_runtimes_profile() {
    for dir in ["base", "overlays/take-over-kubeadm"] {
        let context = pod(dir, &["components/seccomp"]).security_context.unwrap();
        let profile = context.seccomp_profile.unwrap();
        assert_eq!(
            (profile.type_.as_str(), profile.localhost_profile.as_deref()),
            ("Localhost", Some("kube-ipvs.json"))
        );
    }
    let path = deploy().join("seccomp/kube-ipvs.json");
    let profile = Profile::read(&path).unwrap();
    assert!(profile.architectures.iter().any(|name| name == "SCMP_ARCH_AARCH64"));
    profile.compile(&path).unwrap();
    let mut names: Vec<&str> = profile.names().collect();
    names.dedup();
    assert_eq!(names.len(), names.iter().collect::<BTreeSet<_>>().len(), "a name stands there twice");
    // What programs get out of a container with.
    for name in ["mount", "unshare", "setns", "ptrace", "bpf", "init_module", "clone3", "keyctl", "perf_event_open"] {
        assert!(!names.contains(&name), "{name}");
    }
}

#[test]
fn the_role_allows_only_list_watch_and_events() {
    let objects = build(&deploy().join("base"), &[]);
    let role: ClusterRole = serde_json::from_value(find(&objects, "ClusterRole", "kube-ipvs").clone()).unwrap();
    let rules = role.rules.unwrap();
    // What is asked for is compared with this in `contained`.
    let granted: BTreeSet<String> = rules
        .iter()
        .flat_map(|rule| {
            let group = rule.api_groups.iter().flatten().next().unwrap();
            let resources = rule.resources.iter().flatten();
            resources.flat_map(move |resource| rule.verbs.iter().map(move |verb| format!("{verb} {resource}.{group}")))
        })
        .collect();
    let wanted = [
        "create events.events.k8s.io",
        "list endpointslices.discovery.k8s.io",
        "list nodes.",
        "list services.",
        "watch endpointslices.discovery.k8s.io",
        "watch nodes.",
        "watch services.",
    ];
    assert_eq!(granted.iter().map(String::as_str).collect::<Vec<_>>(), wanted);
    let binding: ClusterRoleBinding =
        serde_json::from_value(find(&objects, "ClusterRoleBinding", "kube-ipvs").clone()).unwrap();
    assert_eq!(binding.role_ref.name, "kube-ipvs");
    let subject = &binding.subjects.unwrap()[0];
    assert_eq!(subject.name, "kube-ipvs");
    for dir in ["base", "overlays/take-over-kubeadm"] {
        assert_eq!(pod(dir, &[]).service_account_name.as_deref(), Some("kube-ipvs"));
    }
}

#[test]
fn probes_fail_only_where_a_restart_or_waiting_helps() {
    for pod in [pod("base", &[]), pod("overlays/take-over-kubeadm", &[]), swapped()] {
        let container = &pod.containers[0];
        let live = container.liveness_probe.as_ref().unwrap().http_get.as_ref().unwrap();
        assert_eq!((live.path.as_deref(), &live.host), (Some("/livez"), &None));
        let ready = container.readiness_probe.as_ref().unwrap().http_get.as_ref().unwrap();
        assert_eq!((ready.path.as_deref(), ready.host.as_deref()), (Some("/readyz"), Some("127.0.0.1")));
        assert_eq!([&live.port, &ready.port].map(|port| serde_json::to_value(port).unwrap()), [10256, 10249]);
        let resources = container.resources.as_ref().unwrap();
        assert!(resources.limits.as_ref().unwrap().keys().eq(["memory"]), "no limit of processor time");
    }
}

#[test]
fn the_patch_replaces_kube_proxys_pod_except_listed_fields() {
    let pod = swapped();
    let container = &pod.containers[0];
    assert_eq!(container.command.as_ref().unwrap()[0], "/usr/local/bin/kube-proxy");
    assert_eq!(pod.service_account_name.as_deref(), Some("kube-proxy"));
    let mut leaving = documents(&kubeadm().join("daemon-set.yaml")).remove(0);
    merge(&mut leaving, documents(&deploy().join("patches/kube-proxy-leaves.yaml")).remove(0), "");
    let terms = &leaving["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        ["nodeSelectorTerms"];
    let expression = &terms[0]["matchExpressions"][0];
    let overlay = self::pod("overlays/take-over-kubeadm", &[]);
    let selector = overlay.node_selector.unwrap();
    let (label, value) = selector.iter().find(|(label, _)| *label != "kubernetes.io/os").unwrap();
    assert_eq!((expression["key"].as_str(), expression["operator"].as_str()), (Some(label.as_str()), Some("NotIn")));
    assert_eq!(expression["values"], json!([value]));
    // What the pods of kube-proxy are known by.
    let labels = &leaving["spec"]["template"]["metadata"]["labels"];
    let apart = overlay.affinity.unwrap().pod_anti_affinity.unwrap();
    let term = &apart.required_during_scheduling_ignored_during_execution.unwrap()[0];
    assert_eq!(&serde_json::to_value(term.label_selector.as_ref().unwrap().match_labels.as_ref()).unwrap(), labels);
}
