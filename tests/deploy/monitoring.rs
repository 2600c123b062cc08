//! The dashboard and the alerts: of metrics that there are, and complete enough to be used.

use std::collections::BTreeSet;
use std::fs;

use serde::Deserialize;
use serde_json::Value;

use crate::deploy;

/// All metrics there are, of docs/metrics.md, which a test holds against the program.
fn metrics() -> BTreeSet<String> {
    let page = fs::read_to_string(deploy().join("../docs/metrics.md")).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    rows.map(|(name, _)| name.to_owned()).collect()
}

/// The metrics an expression asks for.
fn asked_for(expression: &str) -> BTreeSet<&str> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let prefixes = ["kube_ipvs_", "kubeproxy_", "process_"];
    words.filter(|word| prefixes.iter().any(|prefix| word.starts_with(prefix))).collect()
}

fn assert_known(expression: &str, metrics: &BTreeSet<String>) {
    let names = asked_for(expression);
    assert!(!names.is_empty(), "{expression}");
    for name in names {
        let of_histogram = ["_bucket", "_count", "_sum"].iter().find_map(|end| name.strip_suffix(end));
        assert!(metrics.contains(of_histogram.unwrap_or(name)), "{name} in {expression}");
    }
    let (open, closed) = (expression.matches('(').count(), expression.matches(')').count());
    assert_eq!(open, closed, "{expression}");
}

fn dashboard() -> Value {
    serde_json::from_str(&fs::read_to_string(deploy().join("monitoring/dashboard.json")).unwrap()).unwrap()
}

#[test]
fn the_dashboard_uses_existing_metrics() {
    let (dashboard, metrics) = (dashboard(), metrics());
    assert!(metrics.len() > 40, "{metrics:?}");
    let mut shown = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().unwrap();
            assert_known(expression, &metrics);
            assert!(expression.contains("instance=~\"$instance\""), "{expression}");
            shown.extend(asked_for(expression).into_iter().map(|name| name.trim_end_matches("_bucket").to_owned()));
        }
    }
    assert!(shown.len() >= 30, "{shown:?}");
}

#[test]
fn the_dashboard_can_be_imported_as_it_is() {
    let dashboard = dashboard();
    assert_eq!(dashboard["schemaVersion"], 39);
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<&str> = variables.iter().map(|variable| variable["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["datasource", "job", "instance"]);
    let (mut ids, mut places) = (BTreeSet::new(), BTreeSet::new());
    let mut rows = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: its id is another's too");
        let number = |field: &str| panel["gridPos"][field].as_u64().unwrap();
        for x in number("x")..number("x") + number("w") {
            assert!(x < 24, "{title}: beside the grid");
            assert!((number("y")..number("y") + number("h")).all(|y| places.insert((x, y))), "{title}: over another");
        }
        if panel["type"] == "row" {
            rows.push(title);
            continue;
        }
        let sources = panel["targets"].as_array().unwrap().iter().map(|target| &target["datasource"]);
        for source in sources.chain([&panel["datasource"]]) {
            assert_eq!(source["uid"], "${datasource}", "{title}");
        }
        assert!(!panel["description"].as_str().unwrap().is_empty(), "{title}");
    }
    assert_eq!(rows, ["Health", "Changes", "Syncs and audits", "Kernel", "Watches", "Process"]);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    groups: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    name: String,
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    alert: String,
    expr: String,
    r#for: String,
    labels: Labels,
    annotations: Annotations,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Labels {
    severity: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Annotations {
    summary: String,
    description: String,
}

#[test]
fn every_alert_uses_existing_metrics_and_has_a_remedy() {
    let text = fs::read_to_string(deploy().join("monitoring/alerts.yaml")).unwrap();
    let rules: Rules = serde_saphyr::from_str(&text).unwrap();
    let metrics = metrics();
    let mut names = BTreeSet::new();
    assert_eq!(rules.groups.iter().map(|group| group.name.as_str()).collect::<Vec<_>>(), ["kube-ipvs"]);
    for rule in rules.groups.into_iter().flat_map(|group| group.rules) {
        let name = rule.alert;
        assert_known(&rule.expr, &metrics);
        assert!(["critical", "warning", "info"].contains(&rule.labels.severity.as_str()), "{name}");
        assert!(rule.r#for.strip_suffix('m').is_some_and(|minutes| minutes.parse::<u32>().is_ok()), "{name}");
        let Annotations { summary, description } = rule.annotations;
        assert!(!summary.is_empty() && summary.len() <= 120 && description.len() > summary.len(), "{name}");
        for text in [summary, description] {
            assert_eq!(text.matches("{{").count(), text.matches("}}").count(), "{name}: {text}");
        }
        assert!(names.insert(name.clone()) && name.starts_with("KubeIpvs"), "{name}");
    }
    assert!(names.len() >= 10, "{names:?}");
}

#[test]
fn the_check_finds_a_metric_that_does_not_exist() {
    assert_eq!(
        asked_for("rate(kube_ipvs_x_bucket{job=~\"y\"}[5m]) / up").into_iter().collect::<Vec<_>>(),
        ["kube_ipvs_x_bucket"]
    );
    let metrics = metrics();
    assert!(!metrics.contains("kube_ipvs_x") && metrics.contains("kube_ipvs_vips"));
    assert!(std::panic::catch_unwind(|| assert_known("kube_ipvs_x > 0", &metrics)).is_err());
}
