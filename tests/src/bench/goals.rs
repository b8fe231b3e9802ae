//! What is to be reached: ratios of modes in one run.

use super::case::{Figure, Ground, figure};

/// A ratio to reach.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    pub figure: Figure,
    pub ground: Ground,
    pub ours: &'static str,
    pub base: &'static str,
    pub at_least: f64,
}

/// What a machine's noise may take from a ratio that is reached.
pub const SLACK: f64 = 0.95;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Reached,
    /// By no more than the noise.
    Nearly,
    Short,
}

impl Outcome {
    pub fn of(value: f64, goal: f64) -> Self {
        if value >= goal {
            Self::Reached
        } else if value >= goal * SLACK {
            Self::Nearly
        } else {
            Self::Short
        }
    }

    pub fn words(self) -> &'static str {
        match self {
            Self::Reached => "reached",
            Self::Nearly => "reached within 5 %",
            Self::Short => "short",
        }
    }
}

/// Every goal.
pub fn all() -> Vec<Goal> {
    let rates =
        [figure::TCP_STREAM, figure::TCP_STREAMS, figure::TCP_RR, figure::UDP_RR, figure::CONNECTS, figure::UDP_SMALL];
    let mut goals = Vec::new();
    let mut add = |figure, ground, ours, base, at_least| goals.push(Goal { figure, ground, ours, base, at_least });
    for (figure, direct, routed, dnat) in [
        (figure::TCP_STREAM, 0.95, 1.10, 1.5),
        (figure::TCP_RR, 0.88, 1.20, 1.7),
        (figure::UDP_RR, 0.88, 1.20, 1.7),
        (figure::CONNECTS, 0.86, 1.20, 2.0),
        (figure::UDP_SMALL, 0.82, 1.25, 1.95),
    ] {
        for (base, at_least) in [("direct", direct), ("routed", routed), ("vxlan+dnat", dnat)] {
            add(figure, Ground::PASS, "ebpf", base, at_least);
        }
    }
    add(figure::TCP_STREAM, Ground::SEG, "ebpf", "direct", 0.93);
    add(figure::TCP_STREAM, Ground::SEG, "ebpf", "routed", 1.0);
    add(figure::TCP_STREAM, Ground::SEG, "ebpf-bare", "direct", 0.65);
    add(figure::SCALING, Ground::PASS, "ebpf", "routed", 1.0);
    for ground in [Ground::PASS_JUMBO, Ground::SEG_JUMBO] {
        add(figure::TCP_STREAM, ground, "ebpf", "direct", 0.91);
    }
    for figure in rates {
        // Translation costs 2 % at most.
        add(figure, Ground::PASS, "ebpf", "ebpf-instance", 0.98);
    }
    for figure in rates {
        add(figure, Ground::PASS, "local", "bridge", 1.07);
    }
    goals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_told_from_falling_short() {
        let outcomes = [1.2, 1.15, 1.13].map(|value| Outcome::of(value, 1.2));
        assert_eq!(outcomes, [Outcome::Reached, Outcome::Nearly, Outcome::Short]);
    }

    #[test]
    fn no_goal_is_there_twice() {
        let goals = all();
        let same = |a: &Goal, b: &Goal| (a.figure, a.ground, a.ours, a.base) == (b.figure, b.ground, b.ours, b.base);
        assert!(goals.iter().enumerate().all(|(at, goal)| goals[..at].iter().all(|other| !same(goal, other))));
        assert_eq!(goals.len(), 15 + 6 + 12);
    }
}
