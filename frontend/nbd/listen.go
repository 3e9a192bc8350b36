package nbd

import (
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// Listen opens a listener on "unix:///absolute/path" or "tcp://host:port". A unix socket is
// readable by its owner only. With replace, a socket file left by an earlier process is removed
// first: only who holds the lock of the data directory knows that it is stale.
func Listen(address string, replace bool) (net.Listener, error) {
	scheme, rest, _ := strings.Cut(address, "://")
	switch scheme {
	case "tcp":
		return net.Listen("tcp", rest)
	case "unix":
		return listenUnix(rest, replace)
	}
	return nil, fmt.Errorf("nbd: address %q is neither unix:///path nor tcp://host:port", address)
}

func listenUnix(path string, replace bool) (net.Listener, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("nbd: socket path %q is not absolute", path)
	}
	if replace {
		if fi, err := os.Lstat(path); err == nil && fi.Mode()&os.ModeSocket != 0 {
			if err := os.Remove(path); err != nil {
				return nil, fmt.Errorf("nbd: replace stale socket: %w", err)
			}
		}
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = ln.Close()
		return nil, fmt.Errorf("nbd: %w", err)
	}
	return ln, nil
}

// URI is the address under which clients find an export on a listener's address, in the form
// the NBD project has registered.
func URI(addr net.Addr, export string) string {
	u := url.URL{Scheme: "nbd", Host: addr.String(), Path: "/" + export}
	if addr.Network() == "unix" {
		u = url.URL{Scheme: "nbd+unix", Path: "/" + export, RawQuery: "socket=" + escapeQuery(addr.String())}
	}
	return u.String()
}

// escapeQuery escapes a path for a query, leaving slashes readable.
func escapeQuery(path string) string {
	return strings.ReplaceAll(strings.ReplaceAll(url.QueryEscape(path), "%2F", "/"), "+", "%20")
}
