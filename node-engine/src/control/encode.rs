//! A report as the messages of one generation.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tracing::warn;

use crate::model::{Generation, InstanceId, NodeId, NodeUsage, Purpose, Query, Report, Status};
use crate::wire::{FromNode, node, sensor, sensor_topic, status, table};

/// Jobs remembered for a first-generation cluster.
const MAX_JOBS: usize = 4096;

/// One message, ready to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) topic: String,
    pub(super) text: String,
    pub(super) purpose: Purpose,
}

/// What a report needs besides itself to become a message.
#[derive(Debug)]
pub(super) struct Encoder {
    pub(super) generation: Generation,
    pub(super) address: Option<IpAddr>,
    pub(super) tunnel_port: u16,
    /// Say each thing under one name, and leave out what only people read.
    pub(super) compact: bool,
    /// First-generation clusters know an instance by the id of its job.
    jobs: BTreeMap<InstanceId, Job>,
}

#[derive(Debug)]
struct Job {
    id: String,
    /// The cluster has been told where the instance is. It is not told which instance that is: said again, it would be about another one
    /// of this job that has no address yet.
    announced: bool,
}

impl Encoder {
    pub(super) fn new(tunnel_port: u16) -> Self {
        Self { generation: Generation::G4, address: None, tunnel_port, compact: false, jobs: BTreeMap::new() }
    }

    /// The cluster wants an instance of this job, and has no address of it.
    pub(super) fn deploying(&mut self, instance: &InstanceId, job: &str) {
        if job.is_empty() || (self.jobs.len() >= MAX_JOBS && !self.jobs.contains_key(instance)) {
            return;
        }
        self.jobs.insert(instance.clone(), Job { id: job.to_owned(), announced: false });
    }

    /// The cluster has been told where this instance is.
    pub(super) fn announced(&mut self, instance: &InstanceId) {
        if let Some(job) = self.jobs.get_mut(instance) {
            job.announced = true;
        }
    }

    /// This was said, and nobody knows whether it was heard.
    pub(super) fn unheard(&mut self, report: &Report) {
        if let Report::Deployed { instance, .. } = report
            && let Some(job) = self.jobs.get_mut(instance)
        {
            job.announced = false;
        }
    }

    /// Does the cluster want this instance of this job already?
    pub(super) fn knows(&self, instance: &InstanceId, job: &str) -> bool {
        self.jobs.get(instance).is_some_and(|known| known.id == job)
    }

    /// The cluster wants this instance no longer.
    pub(super) fn deleting(&mut self, instance: &InstanceId) {
        self.jobs.remove(instance);
    }

    /// What goes where, and for what; nothing where this generation has no message for the report.
    pub(super) fn messages(&mut self, node: &NodeId, report: &Report) -> Vec<Message> {
        if let Report::Sensor(sample) = report {
            let topic = sensor_topic(node, &sample.device);
            return vec![Message { topic, text: sensor(sample), purpose: Purpose::Sensors }];
        }
        let message =
            |(kind, text): (FromNode, String)| Message { topic: kind.topic(node), text, purpose: kind.purpose() };
        self.encode(report).into_iter().map(message).collect()
    }

    /// The messages of a report; none where this generation has no message for it.
    fn encode(&mut self, report: &Report) -> Vec<(FromNode, String)> {
        match self.generation {
            Generation::G1 => self.first_generation(report).into_iter().collect(),
            Generation::G1b => self.between(report),
            Generation::G2 | Generation::G4 => self.current(report),
        }
    }

    fn current(&self, report: &Report) -> Vec<(FromNode, String)> {
        match report {
            Report::Status { instance, status, detail } => {
                vec![(FromNode::Job, status::job_report(instance, *status, detail, self.address))]
            }
            Report::Deployed { instance, addresses } => {
                // Without an address of this node the notice would be refused, and peers could not reach us by it.
                let Some(host) = self.address else {
                    warn!(%instance, "no address of this node is known: peers will not find the instance");
                    return Vec::new();
                };
                let notice = table::Deployed {
                    instance: instance.clone(),
                    addresses: *addresses,
                    host,
                    host_port: self.tunnel_port,
                };
                vec![(FromNode::Deployed, table::deployed(&notice))]
            }
            Report::SubnetRequest => vec![(FromNode::Subnet, table::SUBNET_REQUEST.to_owned())],
            Report::TableQuery(query) => vec![(FromNode::TableQuery, table::table_query(query))],
            Report::InterestAdd(_) | Report::Address(_) | Report::Sensor(_) | Report::Stored(_) => Vec::new(),
            // A service manager that was restarted meanwhile knows of no interest of this node, and dies of the end of one. A question is
            // the beginning of one, and what follows on it is heard after it.
            Report::InterestRemove(service) => vec![
                (FromNode::TableQuery, table::table_query(&Query::Name(service.clone()))),
                (FromNode::InterestRemove, table::interest_remove(service)),
            ],
            Report::Node(usage) => {
                vec![(FromNode::Information, self.information(usage))]
            }
            Report::Instances(usages) => {
                let texts = match self.compact {
                    false => node::resources(usages),
                    true => node::compact_resources(self.generation, usages),
                };
                texts.into_iter().map(|text| (FromNode::Resources, text)).collect()
            }
        }
    }

    fn information(&self, usage: &NodeUsage) -> String {
        match self.compact {
            false => node::information(self.generation, usage, self.address),
            true => node::compact_information(self.generation, usage, self.address),
        }
    }

    /// This generation hears of an instance twice at most: that it is deployed, and that it failed.
    fn first_generation(&mut self, report: &Report) -> Option<(FromNode, String)> {
        match report {
            Report::Status { instance, status: Status::Failed | Status::Dead, detail } => {
                let job = self.jobs.get(instance)?;
                Some((FromNode::Job, status::first_generation_failed(&job.id, detail)))
            }
            Report::Deployed { instance, addresses } => {
                let job = self.first_told(instance)?;
                Some((FromNode::Job, status::first_generation_deployed(job, Some(IpAddr::V4(addresses.v4)))))
            }
            Report::Node(usage) => Some((FromNode::Information, self.information(usage))),
            Report::Status { .. }
            | Report::Stored(_)
            | Report::Address(_)
            | Report::SubnetRequest
            | Report::TableQuery(_)
            | Report::InterestAdd(_)
            | Report::InterestRemove(_)
            | Report::Instances(_)
            | Report::Sensor(_) => None,
        }
    }

    /// Jobs as the first generation hears of them, everything else as the second does. The end of an interest nobody hears of yet.
    fn between(&mut self, report: &Report) -> Vec<(FromNode, String)> {
        match report {
            Report::Status { .. } => self.first_generation(report).into_iter().collect(),
            Report::Deployed { instance, .. } => {
                let mut messages = self.current(report);
                // It names no address: to hear it again does no harm, and one that was never heard would be missed.
                let job = self.jobs.get(instance).map(|job| status::first_generation_deployed(&job.id, None));
                messages.extend(job.map(|text| (FromNode::Job, text)));
                messages
            }
            Report::InterestRemove(_) => Vec::new(),
            Report::Stored(_)
            | Report::Address(_)
            | Report::SubnetRequest
            | Report::TableQuery(_)
            | Report::InterestAdd(_)
            | Report::Node(_)
            | Report::Instances(_)
            | Report::Sensor(_) => self.current(report),
        }
    }

    /// The job of an instance of which the cluster has not been told yet; by now it is.
    fn first_told(&mut self, instance: &InstanceId) -> Option<&str> {
        let job = self.jobs.get_mut(instance).filter(|job| !job.announced)?;
        job.announced = true;
        Some(&job.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Addresses;

    fn deployed(instance: &InstanceId, v4: &str) -> Report {
        let addresses = Addresses { v4: v4.parse().unwrap(), v6: "fc00::2".parse().unwrap() };
        Report::Deployed { instance: instance.clone(), addresses }
    }

    #[test]
    fn the_first_generation_hears_of_jobs_it_gave() {
        let mut encoder = Encoder::new(50103);
        encoder.generation = Generation::G1;
        let instance: InstanceId = "app.default.web.test.instance.2".parse().unwrap();
        let deployed = deployed(&instance, "172.18.0.2");
        let status = |status| Report::Status { instance: instance.clone(), status, detail: "why".into() };
        assert!(encoder.encode(&deployed).is_empty());
        encoder.deploying(&instance, "60c0aa");
        let expected = r#"{"job_id":"60c0aa","status":"DEPLOYED","ns_ip":"172.18.0.2"}"#;
        assert_eq!(encoder.encode(&deployed), [(FromNode::Job, expected.to_owned())]);
        let expected = r#"{"job_id":"60c0aa","status":"FAILED","status_detail":"why"}"#;
        assert_eq!(encoder.encode(&status(Status::Failed)), [(FromNode::Job, expected.to_owned())]);
        for other in [Status::Creating, Status::Created, Status::Running, Status::Completed, Status::Undeployed] {
            assert!(encoder.encode(&status(other)).is_empty());
        }
        encoder.deleting(&instance);
        assert!(encoder.encode(&status(Status::Failed)).is_empty());
    }

    #[test]
    fn the_first_generation_hears_once_where_an_instance_is() {
        let mut encoder = Encoder::new(50103);
        encoder.generation = Generation::G1;
        let instance: InstanceId = "app.default.web.test.instance.2".parse().unwrap();
        let deployed = deployed(&instance, "172.18.0.2");
        let mut said = |change: fn(&mut Encoder, &InstanceId, &Report)| {
            change(&mut encoder, &instance, &deployed);
            encoder.encode(&deployed).len()
        };
        assert_eq!(said(|encoder, instance, _| encoder.deploying(instance, "60c0aa")), 1);
        assert_eq!(said(|_, _, _| {}), 0);
        assert_eq!(said(|encoder, _, report| encoder.unheard(report)), 1, "it may not have come through");
        assert_eq!(said(|encoder, instance, _| encoder.deploying(instance, "60c0aa")), 1, "it is asked for anew");
        assert_eq!(said(|encoder, instance, _| encoder.deleting(instance)), 0);
        assert_eq!(said(|encoder, instance, _| encoder.deploying(instance, "60c0bb")), 1);
        let earlier = |encoder: &mut Encoder, instance: &InstanceId, _: &Report| {
            encoder.deploying(instance, "60c0bb");
            encoder.announced(instance);
        };
        assert_eq!(said(earlier), 0, "an earlier run has said it");
    }

    #[test]
    fn an_interest_begins_before_it_ends() {
        let mut encoder = Encoder::new(50103);
        let remove = Report::InterestRemove("app.default.web.test".parse().unwrap());
        for generation in [Generation::G2, Generation::G4] {
            encoder.generation = generation;
            let messages = encoder.encode(&remove);
            assert_eq!(messages[0], (FromNode::TableQuery, r#"{"sname":"app.default.web.test","sip":""}"#.to_owned()));
            assert_eq!(messages[1], (FromNode::InterestRemove, r#"{"appname":"app.default.web.test"}"#.to_owned()));
            assert_eq!(messages.len(), 2);
        }
        for generation in [Generation::G1, Generation::G1b] {
            encoder.generation = generation;
            assert!(encoder.encode(&remove).is_empty());
        }
    }

    #[test]
    fn between_the_generations_jobs_are_of_the_first_and_the_overlay_of_the_second() {
        let mut encoder = Encoder::new(50103);
        (encoder.generation, encoder.address) = (Generation::G1b, Some("192.0.2.1".parse().unwrap()));
        let instance: InstanceId = "app.default.web.test.instance.2".parse().unwrap();
        encoder.deploying(&instance, "60c0aa");
        let deployed = deployed(&instance, "172.18.0.2");
        let messages = encoder.encode(&deployed);
        assert_eq!(messages[0].0, FromNode::Deployed);
        assert!(messages[0].1.contains(r#""instance_number":2,"nsip":"172.18.0.2""#), "{}", messages[0].1);
        let job = r#"{"job_id":"60c0aa","status":"DEPLOYED","status_detail":""}"#;
        assert_eq!(messages[1..], [(FromNode::Job, job.to_owned())]);
        encoder.announced(&instance);
        assert_eq!(encoder.encode(&deployed), messages, "an earlier run may not have said it");

        let status = |status| Report::Status { instance: instance.clone(), status, detail: String::new() };
        let job = r#"{"job_id":"60c0aa","status":"FAILED","status_detail":""}"#;
        for failed in [Status::Failed, Status::Dead] {
            assert_eq!(encoder.encode(&status(failed)), [(FromNode::Job, job.to_owned())]);
        }
        for other in [Status::Creating, Status::Created, Status::Running, Status::Completed, Status::Undeployed] {
            assert!(encoder.encode(&status(other)).is_empty());
        }
        let query = Report::TableQuery(Query::Name("app.default.web.test".parse().unwrap()));
        for (report, kind) in [(query, FromNode::TableQuery), (Report::SubnetRequest, FromNode::Subnet)] {
            assert_eq!(encoder.encode(&report)[0].0, kind);
        }
    }

    #[test]
    fn no_notice_without_an_address() {
        let mut encoder = Encoder::new(50103);
        let deployed = deployed(&"a.b.c.d.instance.0".parse().unwrap(), "10.18.0.2");
        assert!(encoder.encode(&deployed).is_empty());
        encoder.address = Some("192.0.2.1".parse().unwrap());
        assert_eq!(encoder.encode(&deployed).len(), 1);
    }
}
