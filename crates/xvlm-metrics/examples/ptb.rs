use std::io::Read;
fn main() {
    let mut s = String::new();
    std::io::stdin().read_to_string(&mut s).unwrap();
    let l: Vec<&str> = s.strip_suffix('\n').unwrap_or(&s).split('\n').collect();
    let t = std::time::Instant::now();
    let o = xvlm_metrics::captions::ptb::tokenize_all(&l);
    eprintln!("{:?}", t.elapsed());
    for x in o {
        println!("{x}");
    }
}
