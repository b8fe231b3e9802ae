//! MQTT topics, in both directions.

use crate::model::{Generation, NodeId, Purpose, ServiceName};

/// What a cluster publishes to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToNode {
    Deploy,
    Delete,
    /// The cluster does not know this node (any more).
    Error,
    /// Any other `control/` topic, by its last part.
    OtherControl(String),
    Subnet,
    Table,
    /// Instances of this service came or went.
    Updates(ServiceName),
}

impl ToNode {
    pub fn topic(&self, node: &NodeId) -> String {
        match self {
            Self::Deploy => format!("nodes/{node}/control/deploy"),
            Self::Delete => format!("nodes/{node}/control/delete"),
            Self::Error => format!("nodes/{node}/control/error"),
            Self::OtherControl(name) => format!("nodes/{node}/control/{name}"),
            Self::Subnet => format!("nodes/{node}/net/subnetwork/result"),
            Self::Table => format!("nodes/{node}/net/tablequery/result"),
            Self::Updates(service) => format!("jobs/{service}/updates_available"),
        }
    }

    /// What a topic means to this node; `None` where it is none of ours.
    pub fn parse(topic: &str, node: &NodeId) -> Option<Self> {
        if let Some(service) = topic.strip_prefix("jobs/").and_then(|rest| rest.strip_suffix("/updates_available")) {
            return service.parse().ok().map(Self::Updates);
        }
        let rest = topic.strip_prefix("nodes/")?.strip_prefix(node.as_str())?.strip_prefix('/')?;
        match rest {
            "control/deploy" => Some(Self::Deploy),
            "control/delete" => Some(Self::Delete),
            "control/error" => Some(Self::Error),
            "net/subnetwork/result" => Some(Self::Subnet),
            "net/tablequery/result" => Some(Self::Table),
            _ => rest.strip_prefix("control/").map(|name| Self::OtherControl(name.to_owned())),
        }
    }

    /// What a node hears without having asked for a service.
    pub fn subscriptions(node: &NodeId, generation: Generation) -> Vec<String> {
        match generation {
            // A first-generation cluster has no overlay topics; it answers those questions over HTTP.
            Generation::G1 => vec![format!("nodes/{node}/control/+")],
            Generation::G1b | Generation::G2 | Generation::G4 => {
                [Self::Deploy, Self::Delete, Self::Error, Self::Subnet, Self::Table]
                    .iter()
                    .map(|kind| kind.topic(node))
                    .collect()
            }
        }
    }
}

/// What a node publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FromNode {
    Information,
    Job,
    Resources,
    Subnet,
    TableQuery,
    Deployed,
    AddressChanged,
    InterestRemove,
}

/// Where a node tells what one of its devices says. No generation's clusters listen there.
pub fn sensor_topic(node: &NodeId, device: &str) -> String {
    format!("nodes/{node}/sensors/{device}")
}

impl FromNode {
    pub const ALL: [Self; 8] = [
        Self::Information,
        Self::Job,
        Self::Resources,
        Self::Subnet,
        Self::TableQuery,
        Self::Deployed,
        Self::AddressChanged,
        Self::InterestRemove,
    ];

    /// What a cluster subscribes to, to hear every node.
    pub const SUBSCRIPTIONS: [&str; 4] =
        ["nodes/+/information", "nodes/+/job", "nodes/+/jobs/resources", "nodes/+/net/#"];

    fn suffix(self) -> &'static str {
        match self {
            Self::Information => "information",
            Self::Job => "job",
            Self::Resources => "jobs/resources",
            Self::Subnet => "net/subnet",
            Self::TableQuery => "net/tablequery/request",
            Self::Deployed => "net/service/deployed",
            Self::AddressChanged => "net/service/address-changed",
            Self::InterestRemove => "net/interest/remove",
        }
    }

    pub fn topic(self, node: &NodeId) -> String {
        format!("nodes/{node}/{}", self.suffix())
    }

    /// What its bytes are spent on.
    pub fn purpose(self) -> Purpose {
        match self {
            Self::Information => Purpose::Information,
            Self::Job => Purpose::Job,
            Self::Resources => Purpose::Resources,
            Self::Subnet | Self::TableQuery | Self::Deployed | Self::AddressChanged | Self::InterestRemove => {
                Purpose::Net
            }
        }
    }

    /// Which node says what; `None` where it is nothing a node says.
    pub fn parse(topic: &str) -> Option<(NodeId, Self)> {
        let (node, suffix) = topic.strip_prefix("nodes/")?.split_once('/')?;
        let kind = Self::ALL.into_iter().find(|kind| kind.suffix() == suffix)?;
        Some((node.parse().ok()?, kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_read_what_they_write() {
        let node: NodeId = "6b034ec446528056c08b89ae".parse().unwrap();
        let service: ServiceName = "app.default.web.test".parse().unwrap();
        for kind in [
            ToNode::Deploy,
            ToNode::Delete,
            ToNode::Error,
            ToNode::OtherControl("renew-cert".into()),
            ToNode::Subnet,
            ToNode::Table,
            ToNode::Updates(service),
        ] {
            assert_eq!(ToNode::parse(&kind.topic(&node), &node), Some(kind));
        }
        for kind in FromNode::ALL {
            assert_eq!(FromNode::parse(&kind.topic(&node)), Some((node.clone(), kind)));
        }
    }

    #[test]
    fn foreign_topics_mean_nothing() {
        let node: NodeId = "n1".parse().unwrap();
        for topic in ["", "nodes/n2/control/deploy", "nodes/n1x/control/deploy", "nodes/n1", "jobs/x/updates_available"]
        {
            assert_eq!(ToNode::parse(topic, &node), None, "{topic}");
        }
        for topic in
            ["nodes//job", "nodes/a b/job", "nodes/n1/net/service/undeployed", "jobs/a.b.c.d/updates_available"]
        {
            assert_eq!(FromNode::parse(topic), None, "{topic}");
        }
    }
}
