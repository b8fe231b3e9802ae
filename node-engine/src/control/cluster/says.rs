//! What the node says: reports, interests, and questions that a first-generation cluster answers over HTTP.

use futures_util::future::FutureExt;
use tokio::time::Instant;

use super::{MAX_INBOX, MAX_INTERESTS, MAX_QUESTIONS, Session, updates_topic, watches};
use crate::control::http::ask;
use crate::model::{Command, Generation, Query, Report, ServiceName};
use crate::wire::json::MAX_DOCUMENT;
use crate::wire::table;

impl Session {
    pub(super) fn report(&mut self, report: Report) {
        match &report {
            Report::Node(usage) => self.usage = (**usage).clone(),
            Report::InterestAdd(service) => self.watch(service),
            Report::InterestRemove(service) => self.unwatch(service),
            _ => {}
        }
        if self.up_since.is_some() && !self.exception.is_due(&report, Instant::now()) {
            return;
        }
        match report {
            Report::Stored(ticket) => {
                if let Some(received) = self.received.iter_mut().find(|received| received.ticket == ticket) {
                    received.settled = true;
                }
                self.acknowledge_settled();
            }
            Report::SubnetRequest if self.encoder.generation == Generation::G1 => {
                if let Some(subnet) = self.identity.as_ref().and_then(|identity| identity.subnet) {
                    self.tell(Command::Subnet(subnet));
                }
            }
            Report::TableQuery(query) if self.encoder.generation == Generation::G1 => self.question(query),
            Report::Address(address) => self.renumbered(address),
            report => self.outbox.push(report, self.up_since.is_some()),
        }
    }

    fn watch(&mut self, service: &ServiceName) {
        if self.interests.len() >= MAX_INTERESTS || !self.interests.insert(service.clone()) {
            return;
        }
        if self.up_since.is_some() && watches(self.encoder.generation) {
            let topic = updates_topic(service);
            // Sent after the subscription, it would end it.
            let before = self.unsubscribe.len();
            self.unsubscribe.retain(|waiting| *waiting != topic);
            if self.unsubscribe.len() == before {
                self.subscribe.push_back(vec![topic]);
            }
        }
    }

    fn unwatch(&mut self, service: &ServiceName) {
        if self.interests.remove(service) && self.up_since.is_some() {
            let topic = updates_topic(service);
            let before = self.subscribe.len();
            self.subscribe.retain(|topics| topics.as_slice() != [topic.as_str()]);
            // What the broker never had it need not be told to end.
            if self.subscribe.len() == before {
                self.unsubscribe.push_back(topic);
            }
        }
    }

    fn question(&mut self, query: Query) {
        if self.questions.len() < MAX_INBOX && !self.questions.contains(&query) {
            self.questions.push_back(query);
        }
    }

    pub(super) fn ask_first_generation(&mut self) {
        while self.answers.len() < MAX_QUESTIONS {
            let Some(query) = self.questions.pop_front() else { return };
            let url = self.registrar.overlay_url(&table::first_generation_path(&query));
            let request = self.registrar.http.get(url);
            self.answers.push(
                async move {
                    let answer = match ask(request, MAX_DOCUMENT).await {
                        Ok(answer) if answer.status == 200 => {
                            table::read_table(&answer.body).map_err(|error| error.to_string())
                        }
                        Ok(answer) => Err(format!("status {}", answer.status)),
                        Err(error) => Err(error.to_string()),
                    };
                    (query, answer)
                }
                .boxed(),
            );
        }
    }
}
