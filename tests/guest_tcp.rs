//! TCP ports of a real guest: connections, forwarded ports, half-closes, resets.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::io;
use std::net::Ipv4Addr;

use guest::boot;
use guest::sh;
use guest::until;
use kiln::Vm;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Starts a server in the guest that runs `program` for each connection, and waits until it listens.
async fn serve(vm: &Vm, port: u16, program: &str) -> kiln::ExecChild {
    let port = port.to_string();
    let argv = ["nc", "-ll", "-p", &port, "-e", "sh", "-c", program];
    let server = vm.exec(argv).await.expect("starts");
    until(vm, &format!("netstat -ltn | grep -c :{port}"), "1\n").await;
    server
}

#[tokio::test]
async fn a_connection_is_a_stream_with_half_closes() {
    let vm = boot().await;
    // Answers only once it has read everything: the host's half-close is passed on, and the other half stays open.
    let _server = serve(&vm, 7000, "wc -c").await;
    let mut stream = vm.connect(7000).await.expect("connects");
    stream.write_all(&[b'x'; 300_000]).await.expect("taken");
    stream.shutdown().await.expect("half-closed");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("answered");
    assert_eq!(answer.trim(), "300000");
}

#[tokio::test]
async fn the_guests_half_close_leaves_the_other_half_open() {
    let vm = boot().await;
    let _server = serve(&vm, 7000, "echo bye; exec 1>&-; cat > /tmp/late").await;
    let mut stream = vm.connect(7000).await.expect("connects");
    let mut greeting = [0; 4];
    stream.read_exact(&mut greeting).await.expect("greeted");
    stream.write_all(b"and one more thing").await.expect("taken");
    stream.shutdown().await.expect("half-closed");
    assert_eq!(stream.read(&mut greeting).await.expect("ended"), 0);
    until(&vm, "cat /tmp/late", "and one more thing").await;
}

#[tokio::test]
async fn a_port_without_a_server_refuses() {
    let vm = boot().await;
    let error = vm.connect(7001).await.expect_err("nobody listens");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error:?}");
    let forwarder = vm.expose_tcp(0, 7001).await.expect("listens");
    let mut client = TcpStream::connect(forwarder.local_addr()).await.expect("accepted");
    let refused = client.read(&mut [0; 1]).await.expect_err("reset, not an end of file");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn an_exposed_port_is_loopback_only_and_honours_both_numbers() {
    let vm = boot().await;
    sh(&vm, "mkdir /www; echo hello from the guest > /www/index.html").await;
    let mut httpd = vm.exec(["httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/www"]).await.expect("starts");
    until(&vm, "netstat -ltn | grep -c :8080", "1\n").await;
    let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let port = taken.local_addr().expect("bound").port();
    let error = vm.expose_tcp(port, 8080).await.expect_err("it is taken");
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    drop(taken);
    let forwarder = vm.expose_tcp(port, 8080).await.expect("listens");
    assert_eq!(forwarder.local_addr(), (Ipv4Addr::LOCALHOST, port).into());
    assert_eq!(forwarder.guest_port(), 8080);
    for _ in 0..3 {
        let mut client = TcpStream::connect(forwarder.local_addr()).await.expect("connects");
        client.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").await.expect("sent");
        let mut page = String::new();
        client.read_to_string(&mut page).await.expect("answered");
        assert!(page.starts_with("HTTP/1.") && page.ends_with("hello from the guest\n"), "{page}");
    }
    httpd.kill().await.expect("killed");
    drop(forwarder);
    let refused = async {
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(guest::DEADLINE, refused).await.expect("the listener goes with the forwarder");
}

#[tokio::test]
async fn many_connections_at_once_carry_their_own_bytes() {
    let vm = boot().await;
    let _server = serve(&vm, 7000, "exec cat").await;
    let forwarder = vm.expose_tcp(0, 7000).await.expect("listens");
    let address = forwarder.local_addr();
    let mut running = JoinSet::new();
    for index in 0..20_u8 {
        running.spawn(async move {
            let client = TcpStream::connect(address).await.expect("connects");
            let sent: Vec<u8> = (0..200_000_u32).map(|at| (at % 251) as u8 ^ index).collect();
            let (mut read, mut write) = client.into_split();
            let expected = sent.clone();
            let writing = tokio::spawn(async move {
                write.write_all(&sent).await.expect("sent");
                write.shutdown().await.expect("half-closed");
            });
            let mut received = Vec::new();
            read.read_to_end(&mut received).await.expect("received");
            writing.await.expect("no panic");
            assert!(received == expected, "connection {index}");
        });
    }
    running.join_all().await;
}

#[tokio::test]
async fn a_connection_that_is_dropped_is_closed_in_the_guest() {
    let vm = boot().await;
    let _server = serve(&vm, 7000, "cat > /dev/null; echo over > /tmp/over").await;
    let stream = vm.connect(7000).await.expect("connects");
    until(&vm, "pidof cat > /dev/null && echo runs", "runs\n").await;
    drop(stream);
    until(&vm, "cat /tmp/over 2> /dev/null; true", "over\n").await;
    for polls in 0..8 {
        let connecting = vm.connect(7000);
        tokio::pin!(connecting);
        for _ in 0..polls {
            if futures::poll!(&mut connecting).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
    }
    until(&vm, "pidof cat || echo none", "none\n").await;
}

#[tokio::test]
async fn a_guest_that_stops_ends_its_connections() {
    let vm = boot().await;
    let _server = serve(&vm, 7000, "exec cat").await;
    let forwarder = vm.expose_tcp(0, 7000).await.expect("listens");
    let mut client = TcpStream::connect(forwarder.local_addr()).await.expect("connects");
    client.write_all(b"hi").await.expect("sent");
    client.read_exact(&mut [0; 2]).await.expect("echoed");
    vm.shutdown().await.expect("stopped");
    let ended = tokio::time::timeout(guest::DEADLINE, client.read(&mut [0; 1])).await.expect("no hang");
    assert!(!matches!(ended, Ok(1..)), "{ended:?}");
}
