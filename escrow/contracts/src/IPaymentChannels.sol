// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title Payment channels of x402's scheme `batch-settlement`: its ABI, its types, its rules
/// @notice One deposit pays many calls. The payer signs vouchers over growing totals and gives them to
/// the receiver, who claims the last one when it suits him. A channel is its configuration: nothing
/// but two numbers is stored of it, and its id is the EIP-712 digest of the configuration, which binds
/// it to one chain and one contract.
///
/// What is easily misread:
/// - `balance` is gross: deposits less withdrawals and refunds. What is free is
///   `balance - totalClaimed`.
/// - A voucher that was not claimed reserves nothing.
/// - A withdrawal, once initiated, stays armed for ever: no deposit and no claim cancels it, and what
///   it may take is decided when it is finalised. A refund lowers it.
/// - A claim moves no token. `settle` does, for all channels of a receiver at once.
interface IPaymentChannels {
    struct ChannelConfig {
        address payer;
        address payerAuthorizer; // Signs vouchers by ECDSA; zero: the payer does, by ERC-1271 if it has code.
        address receiver;
        address receiverAuthorizer; // Signs claims and refunds; never zero.
        address token;
        uint40 withdrawDelay; // Seconds between asking for a withdrawal and getting it.
        bytes32 salt;
    }

    struct Voucher {
        ChannelConfig channel;
        uint128 maxClaimableAmount; // Of the channel's whole life, not of this call.
    }

    struct VoucherClaim {
        Voucher voucher;
        bytes signature;
        uint128 totalClaimed; // What the channel's total is to become; at most what the voucher allows.
    }

    /// @notice First deposit into a channel that holds nothing and had nothing claimed. May come again.
    event ChannelCreated(bytes32 indexed channelId, ChannelConfig config);
    /// @notice A channel from which nothing was ever claimed was emptied.
    event ChannelClosed(bytes32 indexed channelId, ChannelConfig config);
    event Deposited(bytes32 indexed channelId, address indexed sender, uint128 amount, uint128 newBalance);
    event Claimed(bytes32 indexed channelId, address indexed sender, uint128 claimAmount, uint128 newTotalClaimed);
    event Settled(address indexed receiver, address indexed token, address indexed sender, uint128 amount);
    event Refunded(bytes32 indexed channelId, address indexed sender, uint128 amount);
    event WithdrawInitiated(bytes32 indexed channelId, uint128 amount, uint40 finalizeAfter);
    event WithdrawFinalized(bytes32 indexed channelId, address indexed sender, uint128 amount);

    // Without values, against this project's habit: clients know these selectors.
    error InvalidChannel();
    error InvalidCollector();
    error InvalidSignature();
    error InvalidRefundNonce();
    error ZeroDeposit();
    error ZeroRefund();
    error EmptyBatch();
    error DepositOverflow();
    error DepositCollectionFailed();
    error NotAuthorizedToClaim();
    error NotAuthorizedToRefund();
    error NotAuthorizedToFinalizeWithdraw();
    error NotReceiverAuthorizer();
    error ClaimExceedsCeiling();
    error ClaimExceedsBalance();
    error NothingToWithdraw();
    error WithdrawAmountExceedsAvailable();
    error WithdrawalAlreadyPending();
    error WithdrawalNotPending();
    error WithdrawDelayNotElapsed();
    error WithdrawDelayOutOfRange();

    /// @notice Adds `amount` to the channel; `collector` brings it, by what the payer signed in
    /// `collectorData`. Anybody may call.
    function deposit(ChannelConfig calldata config, uint128 amount, address collector, bytes calldata collectorData)
        external;

    /// @notice Raises the claimed totals by vouchers. The caller is receiver or receiverAuthorizer of
    /// every row. A row that would raise nothing is passed over; any other fault undoes all rows.
    function claim(VoucherClaim[] calldata voucherClaims) external;

    /// @notice The same for anybody, with the signature of the one receiverAuthorizer of all rows.
    function claimWithSignature(VoucherClaim[] calldata voucherClaims, bytes calldata authorizerSignature) external;

    /// @notice Pays `receiver` what was claimed for it in `token` and not yet paid. Anybody may call.
    function settle(address receiver, address token) external;

    /// @notice Starts the delay of a withdrawal; payer or payerAuthorizer.
    function initiateWithdraw(ChannelConfig calldata config, uint128 amount) external;

    /// @notice Pays the payer what he asked for, or what is free if that is less, after the delay;
    /// payer or payerAuthorizer.
    function finalizeWithdraw(ChannelConfig calldata config) external;

    /// @notice Gives the payer up to `amount` of what is free; receiver or receiverAuthorizer.
    function refund(ChannelConfig calldata config, uint128 amount) external;

    /// @notice The same for anybody, with the receiverAuthorizer's signature over the channel's refund nonce.
    function refundWithSignature(
        ChannelConfig calldata config,
        uint128 amount,
        uint256 nonce,
        bytes calldata receiverAuthorizerSignature
    ) external;

    function getChannelId(ChannelConfig calldata config) external view returns (bytes32);

    function getVoucherDigest(bytes32 channelId, uint128 maxClaimableAmount) external view returns (bytes32);

    function getRefundDigest(bytes32 channelId, uint256 nonce, uint128 amount) external view returns (bytes32);

    function getClaimBatchDigest(VoucherClaim[] calldata voucherClaims) external view returns (bytes32);

    function channels(bytes32 channelId) external view returns (uint128 balance, uint128 totalClaimed);

    function pendingWithdrawals(bytes32 channelId) external view returns (uint128 amount, uint40 initiatedAt);

    function receivers(address receiver, address token)
        external
        view
        returns (uint128 totalClaimed, uint128 totalSettled);

    function refundNonce(bytes32 channelId) external view returns (uint256);

    /// @notice Several of these calls in one transaction; one that fails undoes all.
    function multicall(bytes[] calldata data) external returns (bytes[] memory results);
}

/// @notice Brings the money of a deposit.
interface IDepositCollector {
    /// @notice Moves exactly `amount` of `token` from `payer` to the caller, by what `payer` signed.
    function collect(address payer, address token, uint256 amount, bytes32 channelId, bytes calldata collectorData)
        external;
}
