//! What the node has said to its cluster, by purpose.

/// What a message to the cluster is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Purpose {
    /// How the node fares.
    Information,
    /// How its instances fare.
    Resources,
    /// Statuses of instances.
    Job,
    /// The overlay's questions and notices.
    Net,
    Sensors,
}

impl Purpose {
    pub const ALL: [Self; 5] = [Self::Information, Self::Resources, Self::Job, Self::Net, Self::Sensors];

    pub fn word(self) -> &'static str {
        match self {
            Self::Information => "information",
            Self::Resources => "resources",
            Self::Job => "job",
            Self::Net => "net",
            Self::Sensors => "sensors",
        }
    }
}

/// Topics and payloads of one purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Volume {
    pub messages: u64,
    pub bytes: u64,
}

/// What was sent since the daemon began, and on the day of the last message; and what was not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Days since 1 January 1970, in UTC.
    pub day: u64,
    /// Reports that were given up since the daemon began: a newer one or a lost connection made them void, or there was no room.
    pub dropped: u64,
    today: [Volume; 5],
    total: [Volume; 5],
}

impl Sent {
    /// Counts a message that goes out on this day.
    pub fn add(&mut self, purpose: Purpose, bytes: usize, day: u64) {
        if day != self.day {
            self.day = day;
            self.today = Default::default();
        }
        for volume in [&mut self.today[purpose as usize], &mut self.total[purpose as usize]] {
            volume.messages += 1;
            volume.bytes += bytes as u64;
        }
    }

    /// Since the day began; nothing, where that was the day of no message.
    pub fn on(&self, day: u64, purpose: Purpose) -> Volume {
        if day == self.day { self.today[purpose as usize] } else { Volume::default() }
    }

    pub fn total(&self, purpose: Purpose) -> Volume {
        self.total[purpose as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_begin_anew_and_totals_do_not() {
        let mut sent = Sent::default();
        sent.add(Purpose::Job, 10, 5);
        sent.add(Purpose::Job, 5, 5);
        sent.add(Purpose::Net, 1, 5);
        assert_eq!(sent.on(5, Purpose::Job), Volume { messages: 2, bytes: 15 });
        sent.add(Purpose::Job, 7, 6);
        assert_eq!(sent.on(6, Purpose::Job), Volume { messages: 1, bytes: 7 });
        assert_eq!(sent.on(6, Purpose::Net), Volume::default());
        assert_eq!(sent.on(7, Purpose::Job), Volume::default(), "a day without a message");
        assert_eq!(sent.total(Purpose::Job), Volume { messages: 3, bytes: 22 });
        assert_eq!(Purpose::ALL.map(|purpose| purpose as usize), [0, 1, 2, 3, 4]);
    }
}
