// Package azure is the driver for Azure Blob Storage. An object under key k is the block blob
// <prefix>/k of a container.
//
// What it asks of the service: Put Blob with If-None-Match: * and If-Match decides between rivals; Get
// Blob with a range; a read after a write sees it; List Blobs is in byte order (accounts with a
// hierarchical namespace are not). It uses no leases: a lease ends by the service's clock, so a
// writer that was paused cannot know that it still has one, where a condition on the ETag is decided by the
// service at the write itself.
//
// Retries. A conditional put is sent once, so that its refusal is never the echo of its own lost
// success. Everything else is sent up to three times within about a second; longer patience, limits
// and time-outs are for the caller (backend/adaptive and ctx).
//
// Integrity. Every put carries the body's CRC64, which the service checks; what is read is checked by
// who reads it, since the service checks ranges of at most 4 MiB.
package azure

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
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

	// Credentials, at most one of them; without any the SDK's own chain is asked (environment, workload
	// identity, managed identity, Azure CLI).
	AccountKey       string // shared key
	SAS              string // shared access signature: the query, with or without its question mark
	ConnectionString string
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
	given := 0
	for _, s := range []string{o.AccountKey, o.SAS, o.ConnectionString} {
		if s != "" {
			given++
		}
	}
	if given > 1 {
		errs = append(errs, errors.New("an account key, a SAS or a connection string: only one of them"))
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
	client    *container.Client
	container string
	prefix    string // "" or ending in a slash
	name      string

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
	s := &Store{container: o.Container, pages: map[page]string{}}
	var err error
	if s.client, err = newClient(o); err != nil {
		return nil, fmt.Errorf("azure: %w", err)
	}
	u, err := url.Parse(s.client.URL())
	if err != nil {
		return nil, errors.New("azure: the account does not make a URL")
	}
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

// newClient signs with whatever credentials o has.
func newClient(o Options) (*container.Client, error) {
	client, err := transport.New(transport.Options{CAFile: o.CAFile})
	if err != nil {
		return nil, err
	}
	co := &container.ClientOptions{ClientOptions: azcore.ClientOptions{
		Transport: client,
		Retry:     policy.RetryOptions{MaxRetries: 2, RetryDelay: 200 * time.Millisecond, MaxRetryDelay: 500 * time.Millisecond},
		Telemetry: policy.TelemetryOptions{Disabled: true},
	}}
	if o.ConnectionString != "" {
		c, err := container.NewClientFromConnectionString(o.ConnectionString, o.Container, co)
		if err != nil {
			return nil, errors.New("the connection string cannot be read") // err might repeat it
		}
		return c, nil
	}
	endpoint := strings.TrimRight(o.Endpoint, "/")
	if endpoint == "" {
		endpoint = "https://" + o.Account + ".blob.core.windows.net"
	}
	at := endpoint + "/" + o.Container
	switch {
	case o.AccountKey != "":
		key, err := container.NewSharedKeyCredential(o.Account, o.AccountKey)
		if err != nil {
			return nil, errors.New("the account key is not base64")
		}
		return container.NewClientWithSharedKeyCredential(at, key, co)
	case o.SAS != "":
		return container.NewClientWithNoCredential(at+"?"+strings.TrimPrefix(o.SAS, "?"), co)
	}
	cred, err := azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{
		ClientOptions: azcore.ClientOptions{Transport: client},
	})
	if err != nil {
		return nil, fmt.Errorf("no credentials: %w", err)
	}
	return container.NewClient(at, taggedCredential{cred}, co)
}

// String is "azure://account/container/prefix", and "at endpoint" if it is not Azure's own.
func (s *Store) String() string { return s.name }

// once switches the SDK's retries off.
func once(ctx context.Context) context.Context {
	return policy.WithRetryOptions(ctx, policy.RetryOptions{MaxRetries: -1})
}

// taggedCredential lets errors of getting a token be told from those of using it.
type taggedCredential struct{ azcore.TokenCredential }

type noCredentials struct{ error }

func (e noCredentials) Unwrap() error { return e.error }

// GetToken implements azcore.TokenCredential.
func (c taggedCredential) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	t, err := c.TokenCredential.GetToken(ctx, o)
	if err != nil {
		return t, noCredentials{err}
	}
	return t, nil
}
