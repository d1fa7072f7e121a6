//! How ranks that know nothing of each other but an address find together: rank 0 hands all others the same bytes.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use super::Launch;
use crate::error::{BoxError, TrainError};

/// What begins a greeting, which goes on with the greeter's rank: others may knock at the port too.
const GREETING: [u8; 8] = *b"xvlm-id1";
/// How long a greeting may take.
const GREETED_IN: Duration = Duration::from_secs(5);
/// How long to wait before knocking again.
const AGAIN: Duration = Duration::from_millis(100);

/// The bytes that rank 0 `makes`, on all ranks.
///
/// # Errors
/// [`TrainError::Ranks`] if not all have met in `patience`, or rank 0 could make none.
pub(super) fn meet<const N: usize>(
    launch: &Launch,
    patience: Duration,
    make: impl FnOnce() -> Result<[u8; N], BoxError>,
) -> Result<[u8; N], TrainError> {
    let place = (launch.host.as_str(), launch.port);
    let deadline = Instant::now() + patience;
    let meet = || match launch.rank {
        0 => {
            let bytes = make()?;
            // On all addresses: the name of this machine may be that of a network of its own. Those of IPv6 take in IPv4's,
            // where there is IPv6.
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, launch.port));
            let listener = listener.or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, launch.port)));
            let listener = listener.map_err(|error| format!("port {}: {error}", launch.port))?;
            give(&listener, launch.size, deadline, &bytes)?;
            Ok(bytes)
        }
        rank => take(place, rank, deadline),
    };
    meet().map_err(|source| TrainError::Ranks { rank: launch.rank, operation: "meeting of ranks", source })
}

/// Gives `bytes` to ranks 1 to `size - 1`.
fn give(listener: &TcpListener, size: usize, deadline: Instant, bytes: &[u8]) -> Result<(), BoxError> {
    listener.set_nonblocking(true)?;
    let mut here = vec![false; size];
    here[0] = true;
    while let Some(missing) = here.iter().position(|here| !here) {
        match listener.accept() {
            Ok((stream, _)) => {
                // Who does not greet as a rank does, or breaks off, may come again.
                if let Ok(rank) = greeted(stream, size, bytes) {
                    here[rank] = true;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    let count = here.iter().filter(|here| **here).count();
                    let address = listener.local_addr()?;
                    return Err(format!(
                        "{address}: expected {size} ranks, found {count}; rank {missing} has not come"
                    )
                    .into());
                }
                thread::sleep(AGAIN);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads a greeting and answers it; the rank that sent it.
fn greeted(mut stream: TcpStream, size: usize, bytes: &[u8]) -> io::Result<usize> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(GREETED_IN))?;
    stream.set_write_timeout(Some(GREETED_IN))?;
    let (mut greeting, mut rank) = ([0; GREETING.len()], [0; 8]);
    stream.read_exact(&mut greeting)?;
    stream.read_exact(&mut rank)?;
    let rank = u64::from_le_bytes(rank) as usize;
    if greeting != GREETING || !(1..size).contains(&rank) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    stream.write_all(bytes)?;
    // Gone for good when the other side says that it has them.
    stream.read_exact(&mut [0])?;
    Ok(rank)
}

/// The bytes from rank 0, which may not be there yet.
fn take<const N: usize>(place: (&str, u16), rank: usize, deadline: Instant) -> Result<[u8; N], BoxError> {
    loop {
        let taken = || -> io::Result<[u8; N]> {
            let mut stream = connect(place)?;
            stream.set_read_timeout(Some(GREETED_IN))?;
            stream.write_all(&[GREETING, (rank as u64).to_le_bytes()].concat())?;
            let mut bytes = [0; N];
            stream.read_exact(&mut bytes)?;
            stream.write_all(&[1])?;
            Ok(bytes)
        };
        match taken() {
            Ok(bytes) => return Ok(bytes),
            Err(error) if Instant::now() >= deadline => {
                let (host, port) = place;
                return Err(format!("{host}:{port}: expected rank 0 to answer, found {error}").into());
            }
            Err(_) => thread::sleep(AGAIN),
        }
    }
}

/// A connection to the first of a place's addresses that answers: its name may have several, of which rank 0 has not all.
fn connect(place: (&str, u16)) -> io::Result<TcpStream> {
    let mut last = io::ErrorKind::NotFound.into();
    for address in place.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, GREETED_IN) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(rank: usize, size: usize) -> Launch {
        // A port that was free a moment ago.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Launch { rank, size, local_rank: rank, host: "127.0.0.1".into(), port }
    }

    #[test]
    fn all_ranks_get_the_bytes_of_rank_0() {
        let first = launch(0, 3);
        let met = |rank| {
            let launch = Launch { rank, ..first.clone() };
            let make = move || if rank == 0 { Ok([7, 8, 9]) } else { Err("only rank 0 makes them".into()) };
            move || meet(&launch, Duration::from_secs(60), make).unwrap()
        };
        let rank_0 = thread::spawn(met(0));
        // Somebody else knocks first, and gets nothing.
        let mut stranger = loop {
            match TcpStream::connect(("127.0.0.1", first.port)) {
                Ok(stream) => break stream,
                Err(error) => assert!(!rank_0.is_finished(), "{error}"),
            }
            thread::sleep(Duration::from_millis(1));
        };
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        stranger.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut told = Vec::new();
        // Closed with bytes unread, the connection may end in an error.
        let _ = stranger.read_to_end(&mut told);
        assert_eq!(told, [0; 0]);

        let others = [2, 1].map(|rank| thread::spawn(met(rank)));
        let here = rank_0.join().unwrap();
        assert_eq!(here, [7, 8, 9]);
        others.into_iter().for_each(|other| assert_eq!(other.join().unwrap(), here));
    }

    #[test]
    fn who_does_not_come_is_named() {
        let error = meet(&launch(0, 2), Duration::ZERO, || Ok([1])).unwrap_err().to_string();
        assert!(error.contains("expected 2 ranks, found 1; rank 1 has not come"), "{error}");
        let error = meet(&launch(1, 2), Duration::ZERO, || Ok([1])).unwrap_err().to_string();
        assert!(error.contains("expected rank 0 to answer"), "{error}");
        let error = meet(&launch(0, 2), Duration::ZERO, || Err::<[u8; 1], _>("no id".into())).unwrap_err().to_string();
        assert!(error.contains("no id"), "{error}");
    }
}
