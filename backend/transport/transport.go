// Package transport is what the drivers of stores on the network share: the HTTP client, and how they judge
// answers.
package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"
)

// Options of a client. The zero value trusts what the system trusts.
type Options struct {
	// CAFile names a PEM file of certificate authorities that are trusted instead of the system's.
	CAFile string
	// Dial, if set, makes the connections, for names that only the caller can resolve. The address is
	// host:port; ctx bounds the dialling alone.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// New returns a client for HTTP/1.1, one connection per request in flight: a single HTTP/2 connection
// would carry all of them, and be their bottleneck. It follows no redirects: a store that moved is a
// matter for its configuration.
func New(o Options) (*http.Client, error) {
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: 60 * time.Second, // from the end of the request; ctx usually ends it before
		MaxIdleConns:          64,
		MaxIdleConnsPerHost:   64,
		IdleConnTimeout:       15 * time.Second, // below the servers' own, so that a reused one is alive
		DisableCompression:    true,             // lengths and ranges are those of the stored bytes
		ReadBufferSize:        64 << 10,
		WriteBufferSize:       64 << 10,
	}
	if o.Dial != nil {
		t.DialContext = o.Dial
	}
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, fmt.Errorf("certificate authorities: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("certificate authorities: %s holds no PEM certificate", o.CAFile)
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return &http.Client{
		Transport:     t,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}
