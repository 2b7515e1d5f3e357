//! What is chosen: the user's wishes, the order of the ranks, and what links cost.

use super::*;

#[test]
fn wishes_are_followed_and_nonsense_is_refused() {
    let sum = Collective::AllReduce { op: Reduction::Sum };
    let size = WorldSize::new(4).unwrap();
    let chooser = Chooser::new(Some("allreduce:ring; broadcast:tree"), false).unwrap();
    let choice = chooser.choice(&sum, DType::F32, 8, size);
    assert!(choice.algorithm == Algorithm::Ring && choice.wished, "{choice:?}");
    for wrong in ["ring", "all_reduce:fast", "all_gather:tree", "nothing:ring", "reduce:ring"] {
        assert!(Chooser::new(Some(wrong), false).unwrap_err().to_string().contains("all_reduce:ring"), "{wrong}");
    }
}

#[test]
fn deterministic_floats_are_combined_in_rank_order_and_nothing_else_is_accepted() {
    let chooser = Chooser::new(Some("broadcast:ring"), true).unwrap();
    let hosts = Hosts::new(&[0, 0, 1, 1]);
    for chooser in [chooser.clone(), chooser.on(hosts, LinkCosts::default())] {
        for bytes in [8, 1 << 14, 1 << 20, 1 << 28] {
            for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
                let op = Reduction::Product;
                for combines in [
                    Collective::AllReduce { op },
                    Collective::Reduce { op, root: Rank(1) },
                    Collective::ReduceScatter { op },
                ] {
                    let choice = chooser.choice(&combines, dtype, bytes, WorldSize::new(4).unwrap());
                    assert!(choice.algorithm.keeps_order(), "{combines:?} of {bytes}: {choice:?}");
                }
            }
        }
    }
    let refused = Chooser::new(Some("all_reduce:ring"), true).unwrap_err().to_string();
    assert!(refused.contains("all_reduce:direct") && !refused.contains("all_reduce:halving"), "{refused}");
}

#[test]
fn the_choice_grows_with_the_bytes_and_rounds_halves_once() {
    use Algorithm::{Direct, Doubling, Ring, Short};
    let sum = Collective::AllReduce { op: Reduction::Sum };
    let choice = |dtype, ranks, bytes| Chooser::default().algorithm(&sum, dtype, bytes, WorldSize::new(ranks).unwrap());
    for (ranks, bytes, expected) in [
        (2, 8, vec![Short]),
        (2, 64 << 10, vec![Short]),
        (2, 1 << 28, vec![Direct, Ring]),
        (4, 8, vec![Short]),
        (4, 64 << 10, vec![Direct, Doubling]),
        (4, 1 << 28, vec![Ring]),
        (16, 8, vec![Short, Doubling]),
        (16, 1 << 28, vec![Ring]),
    ] {
        let chosen = choice(DType::F32, ranks, bytes);
        assert!(expected.contains(&chosen), "{ranks} ranks, {bytes} bytes: {chosen:?}");
        let halves = choice(DType::BF16, ranks, bytes);
        assert!(matches!(halves, Short | Direct), "{ranks} ranks, {bytes} bytes: {halves:?}");
    }
}

#[test]
fn several_hosts_choose_what_leaves_them_once() {
    let hosts = Hosts::new(&[0, 0, 0, 0, 1, 1, 1, 1]);
    let chooser = Chooser::default().on(hosts, LinkCosts::default());
    let choice = |collective, bytes| chooser.algorithm(&collective, DType::F32, bytes, WorldSize::new(8).unwrap());
    let op = Reduction::Sum;
    assert_eq!(choice(Collective::AllReduce { op }, 1 << 26), Algorithm::Hierarchical);
    assert_eq!(choice(Collective::ReduceScatter { op }, 1 << 22), Algorithm::Hierarchical);
    assert_eq!(choice(Collective::AllGather, 1 << 22), Algorithm::Hierarchical);
    assert_eq!(choice(Collective::Broadcast { root: Rank(0) }, 1 << 10), Algorithm::Hierarchical);
    // On one host, and on as many as there are ranks, there is nothing to keep together.
    for of_rank in [[0; 8], [0, 1, 2, 3, 4, 5, 6, 7]] {
        let chooser = Chooser::default().on(Hosts::new(&of_rank), LinkCosts::default());
        let choice = chooser.choice(&Collective::AllReduce { op }, DType::F32, 1 << 26, WorldSize::new(8).unwrap());
        assert!(choice.expected_us.iter().all(|(algorithm, _)| *algorithm != Algorithm::Hierarchical));
    }
}

#[test]
fn dear_messages_are_few_and_dear_bytes_are_not_sent_twice() {
    // 16 ranks on as many hosts: a network whose messages take long, and one whose bytes do.
    let chooser = |latency_ns, byte_ns| {
        let far = LinkCost { latency_ns, message_ns: latency_ns / 2.0, byte_ns };
        let costs = LinkCosts { far, measured: true, ..LinkCosts::default() };
        Chooser::default().on(Hosts::new(&(0..16).collect::<Vec<_>>()), costs)
    };
    let sum = Collective::AllReduce { op: Reduction::Sum };
    let choice =
        |latency, byte, bytes| chooser(latency, byte).choice(&sum, DType::F32, bytes, WorldSize::new(16).unwrap());
    let dear_messages = choice(1e6, 0.01, 1 << 12);
    assert!(matches!(dear_messages.algorithm, Algorithm::Doubling | Algorithm::Halving), "{dear_messages:?}");
    let dear_bytes = choice(1e3, 10.0, 1 << 20);
    assert!(matches!(dear_bytes.algorithm, Algorithm::Halving | Algorithm::Ring), "{dear_bytes:?}");
    let total = |choice: &Choice| choice.expected_us[0].1;
    assert!(total(&dear_bytes) > 2.0 * 15.0 / 16.0 * f64::from(1 << 20) * 10.0 / 1e3, "no less than its bytes");
    assert!(dear_bytes.expected_us.is_sorted_by(|(_, one), (_, other)| one <= other));
}
