//! Does: takes checkpoints out as files of safetensors and in again: nothing changes, and nothing foreign gets in.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use gradwire_ps::{
    Adagrad, Adam, Checkpoints, Client, ClientSettings, DType, DenseTable, Eviction, LocalServers, Mode, PsError,
    ServerSettings, Sgd, SparseOptions, SparseTable, TableOptions, UpdateRule, export_checkpoint, import_checkpoint,
};
use gradwire_transport::{Region, RegionSlice};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize, serialize_to_file};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

const ELEMENTS: usize = 9_000;
const DIM: usize = 4;
const IDS: u64 = 300;
const MEMORY: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

struct Worker {
    client: Client,
    half: DenseTable,
    whole: DenseTable,
    rows: SparseTable,
}

fn worker(addresses: &[String]) -> Worker {
    let settings = ClientSettings { worker: Some(0), ..ClientSettings::default() };
    let client = Client::connect(addresses, settings).unwrap();
    let mode = Mode::Sync { workers: 1 };
    let rule = UpdateRule::Adam(Adam { learning_rate: 0.01, ..Adam::default() });
    let options = TableOptions { rule, mode, ..TableOptions::default() };
    let half = client.dense("layer.0/weight", &[3, ELEMENTS / 3], DType::BF16, options).unwrap();
    let rule = UpdateRule::Sgd(Sgd { learning_rate: 0.1, momentum: 0.9, ..Sgd::default() });
    let options = TableOptions { rule, mode, ..TableOptions::default() };
    let whole = client.dense("layer.0/bias", &[ELEMENTS], DType::F32, options).unwrap();
    let rule = UpdateRule::Adagrad(Adagrad { row_wise: true, ..Adagrad::default() });
    let (capacity, eviction) = (Some(IDS * 4), Some(Eviction::Lru));
    let options = SparseOptions { rule, mode, capacity, eviction, ..SparseOptions::default() };
    let rows = client.sparse("users", DIM, DType::F32, options).unwrap();
    Worker { client, half, whole, rows }
}

fn floats(count: usize, seed: u64) -> RegionSlice {
    let number = |n: usize| ((n as u64 * 7 + seed * 13) % 29) as f32 / 7.0 - 2.0;
    let region = Region::from_vec((0..count).flat_map(|n| number(n).to_le_bytes()).collect());
    region.read(0..4 * count).unwrap()
}

fn ids() -> RegionSlice {
    let region = Region::from_vec((0..IDS).flat_map(|n| (n * n).to_le_bytes()).collect());
    region.read(0..8 * IDS as usize).unwrap()
}

impl Worker {
    fn train(&self, steps: std::ops::RangeInclusive<u64>) {
        for step in steps {
            let one = self.half.push_as(floats(ELEMENTS, step), DType::F32).unwrap();
            let two = self.whole.push(floats(ELEMENTS, step + 1)).unwrap();
            let three = self.rows.push(&ids(), &floats(IDS as usize * DIM, step + 2)).unwrap();
            for call in [one, two, three] {
                call.wait(None).unwrap();
            }
        }
    }

    fn values(&self) -> [Vec<u8>; 3] {
        let [half, whole, rows] = [2 * ELEMENTS, 4 * ELEMENTS, 4 * DIM * IDS as usize].map(Region::zeroed);
        self.half.pull(half.write(0..half.len()).unwrap()).unwrap().wait(None).unwrap();
        self.whole.pull(whole.write(0..whole.len()).unwrap()).unwrap().wait(None).unwrap();
        self.rows.pull(&ids(), rows.write(0..rows.len()).unwrap()).unwrap().wait(None).unwrap();
        [half, whole, rows].map(|region| region.read(0..region.len()).unwrap().to_vec())
    }
}

fn settings(folder: &Path) -> ServerSettings {
    let checkpoints = Checkpoints { place: folder.to_str().unwrap().to_owned(), keep: 2 };
    ServerSettings { checkpoints: Some(checkpoints), ..ServerSettings::default() }
}

/// A checkpoint of three shards after three steps, exported: its name, and the values.
fn exported(folder: &Path, file: &Path) -> (String, [Vec<u8>; 3]) {
    let servers = LocalServers::start(3, settings(folder)).unwrap();
    let worker = worker(servers.addresses());
    worker.train(1..=3);
    let name = worker.client.snapshot(PATIENCE).unwrap().name;
    let told = export_checkpoint(folder, file, MEMORY).unwrap();
    assert_eq!((told.name.as_str(), told.tables, told.bytes), (&*name, 3, file.metadata().unwrap().len()));
    (name, worker.values())
}

fn view<'a>(tensors: &SafeTensors<'a>, name: &str, dtype: Dtype, shape: &[usize]) -> TensorView<'a> {
    let view = tensors.tensor(name).unwrap();
    assert_eq!((view.dtype(), view.shape()), (dtype, shape), "{name}");
    view
}

#[test]
fn a_checkpoint_goes_out_and_comes_in_at_any_number_of_shards_with_the_same_bits() {
    let home = tempfile::tempdir().unwrap();
    let [folder, other, file, again] =
        ["one", "two", "a.safetensors", "b.safetensors"].map(|name| home.path().join(name));
    let (name, [half, whole, _]) = exported(&folder, &file);
    // Whoever may read what this process writes may read it.
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
    std::fs::write(&again, "").unwrap();
    assert_eq!(mode(&file), mode(&again));
    let bytes = std::fs::read(&file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let (square, rows) = ([3, ELEMENTS / 3], IDS as usize);
    assert_eq!(*view(&tensors, "layer.0/weight", Dtype::BF16, &square).data(), half);
    for what in ["full", "exp_avg", "exp_avg_sq"] {
        view(&tensors, &format!("layer.0/weight::{what}"), Dtype::F32, &square);
    }
    assert_eq!(*view(&tensors, "layer.0/bias", Dtype::F32, &[ELEMENTS]).data(), whole);
    view(&tensors, "layer.0/bias::momentum_buffer", Dtype::F32, &[ELEMENTS]);
    view(&tensors, "users", Dtype::F32, &[rows, DIM]);
    view(&tensors, "users::sum", Dtype::F32, &[rows, 1]);
    view(&tensors, "users::ids", Dtype::U64, &[rows]);
    let told = SafeTensors::read_metadata(&bytes).unwrap().1.metadata().as_ref().unwrap()["gradwire"].clone();
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["checkpoint"], &told["tables"]["users"]["clock"]), (&name.into(), &3.into()));

    let came = import_checkpoint(&file, &other, MEMORY).unwrap();
    export_checkpoint(&other.join(&came.name), &again, MEMORY).unwrap();
    let back = std::fs::read(&again).unwrap();
    let back = SafeTensors::deserialize(&back).unwrap();
    assert_eq!(back.len(), tensors.len());
    // Rows are told in the order in which they lie, or were used.
    for (name, view) in tensors.iter() {
        assert!(back.tensor(name).unwrap() == view, "{name} has changed");
    }

    let (servers, _) = LocalServers::restore(3, settings(&folder), None).unwrap();
    let expected = {
        let worker = worker(servers.addresses());
        worker.train(4..=5);
        worker.values()
    };
    for shards in [1, 2, 3] {
        let (servers, restored) = LocalServers::restore(shards, settings(&other), None).unwrap();
        assert_eq!(restored.as_ref(), Some(&came.name));
        let worker = worker(servers.addresses());
        assert_eq!((worker.half.clock(), worker.rows.clock()), (3, 3));
        worker.train(4..=5);
        assert!(worker.values() == expected, "{shards} shards");
    }
}

#[test]
fn what_was_cut_changed_or_is_another_program_s_is_refused_by_name_and_writes_nothing() {
    let home = tempfile::tempdir().unwrap();
    let [folder, other, file, bad] =
        ["one", "two", "a.safetensors", "b.safetensors"].map(|name| home.path().join(name));
    exported(&folder, &file);
    let bytes = std::fs::read(&file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let told = SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone();
    let refused = |what: &str| {
        let error = import_checkpoint(&bad, &other, MEMORY).unwrap_err().to_string();
        assert!(error.contains("b.safetensors") && error.contains(what), "{error}");
        assert!(!other.exists(), "nothing is written");
    };
    for length in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&bad, &bytes[..length]).unwrap();
        refused("");
    }
    refused("it was cut");
    std::fs::write(&bad, [&bytes[..], &[0]].concat()).unwrap();
    refused("it was cut, or more was written");
    serialize_to_file(tensors.iter(), None, &bad).unwrap();
    refused("not written by `gradwire-ps export`");
    let without = |name: &str| {
        let rest: Vec<_> = tensors.iter().filter(|(other, _)| *other != name).collect();
        std::fs::write(&bad, serialize(rest, told.clone()).unwrap()).unwrap();
    };
    for name in
        ["layer.0/weight", "layer.0/bias::momentum_buffer", "users::sum", "users::ids", "users::state", "::clients"]
    {
        without(name);
        refused(&format!("{name}: the tensor is missing"));
    }
    let with = |name: &str, view: TensorView<'_>| {
        let rest = tensors.iter().filter(|(other, _)| *other != name).chain([(name, view)]);
        std::fs::write(&bad, serialize(rest.collect::<Vec<_>>(), told.clone()).unwrap()).unwrap();
    };
    let zeros = vec![0; 8 * ELEMENTS];
    with("stranger", TensorView::new(Dtype::U8, vec![3], &zeros[..3]).unwrap());
    refused("stranger: no table has such a tensor");
    with("layer.0/bias", TensorView::new(Dtype::F32, vec![ELEMENTS - 1], &zeros[..4 * (ELEMENTS - 1)]).unwrap());
    refused("layer.0/bias: it has fewer elements");
    with("layer.0/bias", TensorView::new(Dtype::F32, vec![1, ELEMENTS], &zeros[..4 * ELEMENTS]).unwrap());
    refused("its shape is [1, 9000], and the table's [9000]");
    with("layer.0/bias", TensorView::new(Dtype::F64, vec![ELEMENTS], &zeros).unwrap());
    refused("its type is F64, and must be F32");
    let view = tensors.tensor("layer.0/bias::state").unwrap();
    let mut changed = view.data().to_vec();
    changed[20] ^= 1;
    with("layer.0/bias::state", TensorView::new(Dtype::U8, vec![changed.len()], &changed).unwrap());
    refused("checksum");
    let small = import_checkpoint(&file, &other, 1 << 16).unwrap_err().to_string();
    assert!(small.contains("memory"), "{small}");
    let missing = export_checkpoint(&home.path().join("nowhere"), &bad, MEMORY).unwrap_err().to_string();
    assert!(missing.contains("nowhere"), "{missing}");
    std::fs::create_dir(&other).unwrap();
    let empty = export_checkpoint(&other, &bad, MEMORY).unwrap_err().to_string();
    assert!(empty.contains("there is no whole checkpoint"), "{empty}");
}

#[test]
fn a_header_that_promises_what_the_file_has_not_is_refused_with_the_file_and_the_tensor() {
    let home = tempfile::tempdir().unwrap();
    let (bad, other) = (home.path().join("b.safetensors"), home.path().join("two"));
    let write = |length: u64, header: &str, data: usize| {
        std::fs::write(&bad, [&length.to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()).unwrap();
    };
    let refused = |what: &str| {
        let error = import_checkpoint(&bad, &other, MEMORY).unwrap_err();
        assert!(matches!(error, PsError::Invalid { .. }));
        let error = error.to_string();
        assert!(error.contains("b.safetensors") && error.contains(what), "{error}");
        assert!(!other.exists(), "nothing is written");
    };
    let one = |info: &str, data: usize| {
        let header =
            format!(r#"{{"__metadata__":{{}},"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}},"w":{info}}}"#);
        write(header.len() as u64, &header, data);
    };
    for length in [u64::MAX, 1 << 40, (16 << 20) + 1] {
        write(length, "{}", 64);
        refused(&format!("its header would have {length} bytes"));
    }
    write(67, "{}", 64);
    refused("its header would end at byte 75, and it has 74");
    write(2, "{]", 64);
    refused("it is no safetensors file");
    one(r#"{"dtype":"F32","shape":[4],"data_offsets":[4,20]}"#, 15);
    refused("w: it would end at byte 20, and the file has 15");
    one(r#"{"dtype":"F32","shape":[4],"data_offsets":[2,18]}"#, 18);
    refused("w: it lies on another tensor");
    one(r#"{"dtype":"F32","shape":[4],"data_offsets":[6,22]}"#, 22);
    refused("w: it lies behind a gap");
    one(r#"{"dtype":"F32","shape":[0],"data_offsets":[9,4]}"#, 16);
    refused("w: it would end at byte 4, before it begins at 9");
    let most = u64::MAX;
    one(&format!(r#"{{"dtype":"F32","shape":[4],"data_offsets":[4,{most}]}}"#), 16);
    refused(&format!("w: it would end at byte {most}"));
    one(r#"{"dtype":"F32","shape":[5],"data_offsets":[4,20]}"#, 20);
    refused("w: it has 16 bytes, which F32 of shape [5] does not take");
    one(&format!(r#"{{"dtype":"F32","shape":[{most},{most}],"data_offsets":[4,20]}}"#), 20);
    refused("w: it has 16 bytes");
    for wrong in [r#"{"dtype":"F31","shape":[4],"data_offsets":[4,20]}"#, r#"{"dtype":"F32","shape":[-4]}"#, "7"] {
        one(wrong, 20);
        refused("w: it cannot be read what it is");
    }
    one(r#"{"dtype":"F32","shape":[4],"data_offsets":[4,20]}"#, 21);
    refused("it was cut, or more was written behind it");
}
