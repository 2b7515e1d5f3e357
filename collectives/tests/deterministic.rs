//! With `deterministic`, the bits of a result depend on what goes in, the order of the ranks, the reduction and the type; not
//! on how a buffer is cut, on the algorithm or on the way that bytes go.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod common;

use common::{Way, group, over_verbs};
use gradwire_collectives::reduce::fold;
use gradwire_collectives::{Call, Collective, Communicator, DType, Piece, Reduction, Settings};
use gradwire_transport::verbs::Fabric;
use gradwire_transport::{Config, GroupSpec, MemoryStore, Rank, Region, WireChoice, WorldSize, form_group, tcp};
use std::sync::Arc;
use std::time::{Duration, Instant};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];
const OPS: [Reduction; 3] = [Reduction::Sum, Reduction::Avg, Reduction::Product];
const LENGTHS: [usize; 3] = [1, 777, 40_003];

/// Floats between a half and one and a half, whose sums round in each order in their own way.
fn floats(rank: u32, dtype: DType, len: usize) -> Vec<u8> {
    let mut state = u64::from(rank + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        0.5 + (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut one = || match dtype {
        DType::F32 => (next() as f32).to_le_bytes().to_vec(),
        DType::F64 => next().to_le_bytes().to_vec(),
        // The upper half of a 32-bit float.
        DType::BF16 => (next() as f32).to_le_bytes()[2..].to_vec(),
        // 1 sign, 5 exponent and 10 bits of mantissa, for numbers of one half to one.
        _ => (14u16 << 10 | (next() * 1023.0) as u16 & 1023).to_le_bytes().to_vec(),
    };
    (0..len).flat_map(|_| one()).collect()
}

/// What all ranks' floats give when they are combined in the order of the ranks, all at once.
fn in_rank_order(ranks: u32, dtype: DType, op: Reduction, len: usize) -> Vec<u8> {
    let all: Vec<Vec<u8>> = (0..ranks).map(|rank| floats(rank, dtype, len)).collect();
    let others: Vec<&[u8]> = all[1..].iter().map(Vec::as_slice).collect();
    let mut result = all[0].clone();
    fold(dtype, op, &mut result, 0, &others, None, ranks as usize).unwrap();
    result
}

fn run(c: &Communicator, collective: Collective, dtype: DType, input: Vec<Piece>, output: Piece) {
    c.run(Call { collective, dtype, input, output: vec![output], timeout: None }).unwrap();
}

fn bytes(region: &Arc<Region>) -> Vec<u8> {
    region.read(0..region.len()).unwrap().to_vec()
}

/// Every collective that combines, whole and in pieces that begin anywhere.
fn check(c: &Communicator, what: &str) {
    let (n, me) = (c.world_size().get(), c.rank());
    for (dtype, op, len) in
        DTYPES.iter().flat_map(|d| OPS.map(|op| (*d, op))).flat_map(|(d, op)| LENGTHS.map(|l| (d, op, l)))
    {
        let name = format!("{what}, {n} ranks, {op:?} of {len} {dtype}");
        let expected = in_rank_order(n, dtype, op, len);
        let mine = || Region::from_vec(floats(me.0, dtype, len));
        let whole = mine();
        run(c, Collective::AllReduce { op }, dtype, vec![], Piece::whole(Arc::clone(&whole)));
        assert!(bytes(&whole) == expected, "{name}: all_reduce");
        // In two buckets, the first of which is short.
        let parts = mine();
        let cut = len / 29 * dtype.bytes();
        for range in [0..cut, cut..parts.len()] {
            run(c, Collective::AllReduce { op }, dtype, vec![], Piece { region: Arc::clone(&parts), range });
        }
        assert!(bytes(&parts) == expected, "{name}: all_reduce in parts");
        let one = mine();
        let root = Rank(n - 1);
        run(c, Collective::Reduce { op, root }, dtype, vec![], Piece::whole(Arc::clone(&one)));
        assert!(me != root || bytes(&one) == expected, "{name}: reduce");
        // Everybody's part is the whole, so that every rank checks all of it.
        let all = floats(me.0, dtype, len).repeat(n as usize);
        let share = Region::zeroed(len * dtype.bytes());
        let input = vec![Piece::whole(Region::from_vec(all))];
        run(c, Collective::ReduceScatter { op }, dtype, input, Piece::whole(Arc::clone(&share)));
        assert!(bytes(&share) == expected, "{name}: reduce_scatter");
    }
}

fn settings(algorithms: Option<&str>) -> Settings {
    // Two hosts, so that what leaves a host once would be chosen.
    let hosts = Some(vec![0, 0, 1, 1, 1]);
    Settings { deterministic: true, algorithms: algorithms.map(str::to_owned), hosts, ..Settings::default() }
}

#[test]
fn the_bits_are_those_of_one_fold_in_rank_order_by_every_way_and_algorithm() {
    for size in [2, 3, 5] {
        let hosts =
            |settings: Settings| Settings { hosts: settings.hosts.map(|hosts| hosts[..size].to_vec()), ..settings };
        for algorithms in [None, Some("all_reduce:direct"), Some("all_reduce:short")] {
            group(size as u32, Way::Tcp, hosts(settings(algorithms)), |c| check(c, &format!("tcp, {algorithms:?}")));
        }
        for way in [Way::Lanes, Way::Shm, Way::Segment] {
            group(size as u32, way, hosts(settings(None)), |c| check(c, &format!("{way:?}")));
        }
    }
}

#[test]
fn the_bits_are_the_same_over_queue_pairs() {
    let fabric = Fabric::default();
    let (a, b) = tcp::pair(&Config::default(), &Config::default()).unwrap();
    let settings = || Settings { hosts: None, ..settings(None) };
    let groups = [over_verbs(a, 0, &fabric, settings()), over_verbs(b, 1, &fabric, settings())];
    std::thread::scope(|scope| {
        let threads = groups.each_ref().map(|group| scope.spawn(|| check(group, "verbs")));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn without_it_the_algorithm_shows_in_the_bits() {
    // Else the tests above would show nothing.
    let ring = Settings { algorithms: Some("all_reduce:ring".to_owned()), ..Settings::default() };
    group(3, Way::Tcp, ring, |c| {
        let buffer = Region::from_vec(floats(c.rank().0, DType::F32, 40_003));
        run(c, Collective::AllReduce { op: Reduction::Sum }, DType::F32, vec![], Piece::whole(Arc::clone(&buffer)));
        assert!(bytes(&buffer) != in_rank_order(3, DType::F32, Reduction::Sum, 40_003));
    });
}

#[test]
fn a_rank_that_is_not_deterministic_is_found_out() {
    let store = Arc::new(MemoryStore::default());
    let one = |own: u32| {
        let world_size = WorldSize::new(2).unwrap();
        let config = Config { wire: WireChoice::Tcp, ..Config::default() };
        let spec = GroupSpec { name: "odd".into(), rank: Rank(own), world_size, store: store.clone(), config };
        let deadline = Instant::now() + Duration::from_secs(20);
        let group = form_group(spec, deadline).unwrap();
        let settings = Settings { deterministic: own == 0, ..Settings::default() };
        let c = Communicator::new(group, "odd", settings).unwrap();
        let output = vec![Piece::whole(Region::zeroed(4))];
        let collective = Collective::AllReduce { op: Reduction::Sum };
        c.run(Call { collective, dtype: DType::F32, input: vec![], output, timeout: None }).unwrap_err().to_string()
    };
    std::thread::scope(|scope| {
        let one = &one;
        for thread in [0, 1].map(|own| scope.spawn(move || one(own))) {
            let error = thread.join().unwrap();
            assert!(error.contains("sum in rank order of 1 float32"), "{error}");
        }
    });
}
