//! Tells the cluster where the instances on this node are.
//!
//! A cluster that was restarted knows no service before somebody asks for it, and what it is told of one that it does not know is lost, or
//! ends it. So over a new connection it is asked first, and told of a service's instances once it has answered, whatever it says; or once
//! it has had its time, since one that does not answer may hear all the same.

use std::time::Duration;

use super::{Core, Effect};
use crate::model::{Addresses, InstanceId, Query, Report, ServiceName, TableAnswer};

/// So long the answer about a service is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

impl Core {
    /// The broker is there again: the cluster may have forgotten where the instances are.
    pub(super) fn announce_after_answers(&mut self) {
        let until = self.now + PATIENCE;
        let up = self.members.iter().filter(|(_, member)| member.connected());
        self.unannounced = up.map(|(id, _)| (id.service.clone(), until)).collect();
    }

    /// An answer came, whatever it says of the service.
    pub(super) fn announce_answered(&mut self, answer: &TableAnswer, out: &mut Vec<Effect>) {
        let asked = match &answer.query {
            Some(Query::Name(service)) => Some(service),
            Some(Query::Address(_)) | None => None,
        };
        for service in asked.into_iter().chain(&answer.service) {
            if self.unannounced.remove(service).is_some() {
                self.announce(Some(service), out);
            }
        }
    }

    /// No answer came in time.
    pub(super) fn announce_unanswered(&mut self, out: &mut Vec<Effect>) {
        let now = self.now;
        let late: Vec<ServiceName> =
            self.unannounced.extract_if(.., |_, until| *until <= now).map(|(service, _)| service).collect();
        for service in late {
            self.announce(Some(&service), out);
        }
    }

    /// The instance is connected. What the cluster was told before is told again after the answer, with all others; what it was not told
    /// has to reach it before the word that it runs, which may wait already.
    pub(in crate::netmanager) fn announce_one(&mut self, id: &InstanceId, addresses: Addresses, out: &mut Vec<Effect>) {
        let at_once = self.connected && !self.unannounced.contains_key(&id.service);
        let Some(member) = self.members.get_mut(id) else { return };
        if !std::mem::replace(&mut member.announced, true) || at_once {
            out.push(deployed(id, addresses));
        }
    }

    /// Reports the instances of a service, or all, whose network is up, and where.
    pub(super) fn announce(&self, service: Option<&ServiceName>, out: &mut Vec<Effect>) {
        let meant = |id: &InstanceId| service.is_none_or(|service| *service == id.service);
        for (id, member) in self.members.iter().filter(|(id, member)| meant(id) && member.connected()) {
            out.extend(member.addresses.map(|addresses| deployed(id, addresses)));
        }
    }
}

fn deployed(id: &InstanceId, addresses: Addresses) -> Effect {
    Effect::Report(Report::Deployed { instance: id.clone(), addresses })
}
