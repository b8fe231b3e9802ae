//! What the cluster says: each message is read, told, and acknowledged in its turn.

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{Received, Session};
use crate::control::mqtt::Unacknowledged;
use crate::model::{Command, InstanceId, NodeId, Query, Receipt, Report, Status, TableAnswer};
use crate::wire::json::{Malformed, excerpt};
use crate::wire::order::OrderTopic;
use crate::wire::{Order, OrderError, ToNode, generation, order, table};

impl Session {
    pub(super) fn tell(&mut self, command: Command) {
        if self.deadline.is_none() && !self.commands_over {
            self.inbox.push_back(command);
        }
    }

    pub(super) fn answered(&mut self, query: &Query, answer: Result<TableAnswer, String>) {
        match answer {
            Ok(mut answer) => {
                // These answers do not repeat the question.
                answer.query = Some(query.clone());
                self.tell(Command::Table(answer));
            }
            Err(error) => debug!(?query, %error, "no answer from the service table"),
        }
    }

    /// This one needs nothing more. The broker is told when it is its turn.
    pub(super) fn acknowledge(&mut self, receipt: Unacknowledged) {
        if self.ticket(receipt).is_some()
            && let Some(last) = self.received.back_mut()
        {
            last.settled = true;
        }
        self.acknowledge_settled();
    }

    pub(super) fn acknowledge_settled(&mut self) {
        while self.received.front().is_some_and(|received| received.settled) {
            let (Some(link), Some(received)) = (&self.link, self.received.pop_front()) else { return };
            if let Err(error) = link.acknowledge(received.receipt) {
                return self.down(&error.to_string());
            }
        }
    }

    /// Takes in a message. What comes back is to be acknowledged now; an order is when it is stored.
    pub(super) fn message(&mut self, topic: &str, payload: &[u8], receipt: Unacknowledged) -> Unacknowledged {
        self.heard_at = Instant::now();
        if self.deadline.is_some() {
            // Nobody takes it any more; the broker may give it to the next start.
            return Unacknowledged::default();
        }
        let Some(node) = self.identity.as_ref().map(|identity| identity.id.clone()) else { return receipt };
        match ToNode::parse(topic, &node) {
            Some(ToNode::Deploy) => return self.order(OrderTopic::Deploy, payload, &node, receipt),
            Some(ToNode::Delete) => return self.order(OrderTopic::Delete, payload, &node, receipt),
            Some(ToNode::Error) => {
                info!(message = excerpt(payload), "the cluster does not know this node, registering again");
                let wait = self.register_backoff.next();
                self.register_again(wait);
            }
            Some(ToNode::Subnet) => match table::read_subnet(payload) {
                Ok(subnet) => self.tell(Command::Subnet(subnet)),
                Err(error) => malformed(topic, payload, &error),
            },
            Some(ToNode::Table) => match table::read_table(payload) {
                Ok(answer) => self.tell(Command::Table(answer)),
                Err(error) => malformed(topic, payload, &error),
            },
            Some(ToNode::Updates(service)) => self.tell(Command::ServiceChanged(service)),
            Some(ToNode::OtherControl(name)) => {
                debug!(name = excerpt(name.as_bytes()), "a control message of a kind this node does not know");
            }
            None => debug!(topic = excerpt(topic.as_bytes()), "a message on a topic of nobody here"),
        }
        receipt
    }

    fn order(&mut self, topic: OrderTopic, payload: &[u8], node: &NodeId, receipt: Unacknowledged) -> Unacknowledged {
        let generation = generation(payload);
        let read = order(topic, payload, Some(node), &|instance, job| self.encoder.knows(instance, job));
        match read {
            Ok(Order::Deploy(spec)) => {
                self.encoder.deploying(&spec.id, &spec.job);
                self.outbox.deploying(&spec.id);
                let ticket = self.ticket(receipt);
                self.tell(Command::Deploy(spec, Receipt { ticket, generation }));
                return Unacknowledged::default();
            }
            Ok(Order::Delete(mut instances)) => {
                let Some(last) = instances.pop() else { return receipt };
                for instance in instances {
                    self.deleting(&instance, generation);
                    self.tell(Command::Delete(instance, Receipt { ticket: None, generation }));
                }
                self.deleting(&last, generation);
                let ticket = self.ticket(receipt);
                self.tell(Command::Delete(last, Receipt { ticket, generation }));
                return Unacknowledged::default();
            }
            Err(error) => {
                // Not the message: it may hold secrets.
                warn!(%error, "a control message that cannot be carried out");
                if let OrderError::Deploy(refused) = &error
                    && let Some(instance) = refused.instance.clone()
                {
                    let failed = Report::Status { instance, status: Status::Failed, detail: error.to_string() };
                    self.outbox.push(failed, self.up_since.is_some());
                }
            }
        }
        receipt
    }

    /// A cluster that counts its orders takes no word about one copy for one about the next, and its order may be old and not count.
    fn deleting(&mut self, instance: &InstanceId, generation: Option<u64>) {
        self.encoder.deleting(instance);
        if generation.is_none() {
            self.outbox.deleting(instance);
        }
    }

    fn ticket(&mut self, receipt: Unacknowledged) -> Option<u64> {
        if !receipt.is_waited_for() {
            return None;
        }
        self.next_ticket += 1;
        self.received.push_back(Received { ticket: self.next_ticket, receipt, settled: false });
        Some(self.next_ticket)
    }
}

fn malformed(topic: &str, payload: &[u8], error: &Malformed) {
    warn!(topic = excerpt(topic.as_bytes()), %error, message = excerpt(payload), "a message that cannot be understood");
}
