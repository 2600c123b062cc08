//! The server over HTTP.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;

use crate::Server;

impl Server {
    /// Listens on a free port of 127.0.0.1, on the runtime this is called on, until that ends.
    pub async fn listen(&self) -> io::Result<SocketAddr> {
        self.listen_at((Ipv4Addr::LOCALHOST, 0).into()).await
    }

    /// Listens at an address, where port 0 is a free one, on the runtime this is called on, until that ends.
    pub async fn listen_at(&self, address: SocketAddr) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        tokio::spawn(self.clone().accept(listener));
        Ok(address)
    }

    /// Listens on a free port of 127.0.0.1, on a thread of its own, until the process ends: for tests without a
    /// runtime.
    pub fn listen_in_thread(&self) -> io::Result<SocketAddr> {
        self.listen_in_thread_at((Ipv4Addr::LOCALHOST, 0).into())
    }

    /// The same at an address, where port 0 is a free one, of the calling thread's network namespace.
    pub fn listen_in_thread_at(&self, address: SocketAddr) -> io::Result<SocketAddr> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let address = runtime.block_on(self.listen_at(address))?;
        std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
        Ok(address)
    }

    async fn accept(self, listener: TcpListener) {
        while let Ok((connection, _)) = listener.accept().await {
            // As Go's servers do: an event does not wait for the last one to be acknowledged.
            let _ = connection.set_nodelay(true);
            tokio::spawn(self.clone().serve(connection));
        }
    }

    pub(crate) async fn serve(self, connection: impl AsyncRead + AsyncWrite + Unpin) {
        let service = service_fn(move |request| self.clone().answer(request));
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new());
        // A connection that ends is the client's or a fault's business.
        let _ = builder.serve_connection(TokioIo::new(connection), service).await;
    }
}
