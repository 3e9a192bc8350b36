// Package azure is the driver for Azure Blob Storage. An object under key k is the block blob
// <prefix>/k of a container.
//
// What it asks of the service: Put Blob with If-None-Match: * and If-Match decides between rivals; Get
// Blob with a range; a read after a write sees it; List Blobs is in byte order (accounts with a
// hierarchical namespace are not, and pool check says so). Lists are flat: no caller asks for folders, and
// a list by delimiter costs a request for each.
//
// Leases. It takes none: a lease ends by the service's clock, so a writer that was paused cannot know that it
// still has one, where a condition on the ETag is decided by the service at the write itself. A lease that
// somebody holds on a blob makes puts fail (Permanent, with the reason). Where a lease does serve is on the
// container: an infinite one, taken by its owner, keeps it from being deleted by mistake, and hinders nothing here.
//
// Credentials may be rotated while the store is open: Refresh, which backend/adaptive calls when they are refused.
// Calls under way end with those they began with. A signature (SAS) is part of every URL, so no error keeps one.
//
// Retries. A conditional put is sent once, so that its refusal is never the echo of its own lost
// success. Everything else is sent up to Options.Attempts times within about a second; longer patience, limits
// and time-outs are for the caller (backend/adaptive and ctx). The gateway sets Attempts to 1: what the SDK
// sends again by itself is not counted, keeps to no limit, and hides from adaptive that a service throttles.
//
// Integrity. Every put carries the body's CRC64, which the service checks; what is read is checked by
// who reads it, since the service checks ranges of at most 4 MiB.
package azure

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"

	"graindisk/backend"
	"graindisk/backend/transport"
)

// Options name a container and how to get at it.
type Options struct {
	Account   string // name of the storage account; may be left out with a connection string
	Container string // must exist
	Prefix    string // "" or a folder within the container, itself a valid key
	Endpoint  string // default https://ACCOUNT.blob.core.windows.net; an emulator's has the account in its path
	CAFile    string // PEM file of certificate authorities, instead of the system's

	// Attempts of a call, but for a conditional put, which is sent once; default 3. 1 is for who tries again himself,
	// and wants every request counted and within his limits.
	Attempts int

	Credentials
	// Renew gets the credentials again for Refresh; nil if they cannot change while the store is open.
	Renew func(ctx context.Context) (Credentials, error)
}

func (o Options) validate() error {
	var errs []error
	if o.Container == "" {
		errs = append(errs, errors.New("no container"))
	}
	if o.Account == "" && o.ConnectionString == "" {
		errs = append(errs, errors.New("no account"))
	}
	if o.Prefix != "" {
		if err := backend.CheckKey(o.Prefix); err != nil {
			errs = append(errs, fmt.Errorf("prefix: %w", err))
		}
	}
	if err := o.Credentials.validate(); err != nil {
		errs = append(errs, err)
	}
	if o.Attempts < 0 {
		errs = append(errs, fmt.Errorf("%d attempts", o.Attempts))
	}
	if o.Endpoint != "" {
		u, err := url.Parse(o.Endpoint)
		switch {
		case err != nil:
			errs = append(errs, errors.New("endpoint is not a URL")) // err might repeat a signature
		case u.Scheme != "http" && u.Scheme != "https", u.Host == "", u.User != nil, u.RawQuery != "":
			errs = append(errs, fmt.Errorf("endpoint %s://%s: want http://host[:port][/account] or https", u.Scheme, u.Host))
		}
	}
	return errors.Join(errs...)
}

// Store is one container, below a prefix.
type Store struct {
	o      Options
	http   *http.Client
	prefix string // "" or ending in a slash
	name   string

	refreshing sync.Mutex // held while credentials are had anew
	session    atomic.Pointer[session]
	stored     atomic.Bool // a put succeeded
	versioned  atomic.Bool // and the service said that it made a version

	mu    sync.Mutex
	pages map[page]string // where the next page of a list begins, as the service said
}

var _ backend.Store = (*Store)(nil)

// Open makes a Store. It sends nothing to the service: a store that is away, and what credentials there
// are, is found out by the first call.
func Open(o Options) (*Store, error) {
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("azure: invalid options: %w", err)
	}
	s := &Store{o: o, pages: map[page]string{}}
	var err error
	if s.http, err = transport.New(transport.Options{CAFile: o.CAFile}); err != nil {
		return nil, fmt.Errorf("azure: %w", err)
	}
	first, err := newSession(o, o.Credentials, s.http)
	if err != nil {
		return nil, fmt.Errorf("azure: %w", err)
	}
	u, err := first.place()
	if err != nil {
		return nil, fmt.Errorf("azure: %w", err)
	}
	s.session.Store(first)
	account := o.Account
	if account == "" {
		account, _, _ = strings.Cut(u.Host, ".")
	}
	s.name = "azure://" + account + "/" + o.Container
	if o.Prefix != "" {
		s.prefix = o.Prefix + "/"
		s.name += "/" + o.Prefix
	}
	if !strings.HasSuffix(u.Hostname(), ".blob.core.windows.net") {
		s.name += " at " + u.Scheme + "://" + u.Host
	}
	return s, nil
}

// client is the container's, with the credentials of the moment.
func (s *Store) client() *container.Client { return s.session.Load().container }

// String is "azure://account/container/prefix", and "at endpoint" if it is not Azure's own.
func (s *Store) String() string { return s.name }

// once switches the SDK's retries off.
func once(ctx context.Context) context.Context {
	return policy.WithRetryOptions(ctx, policy.RetryOptions{MaxRetries: -1})
}
