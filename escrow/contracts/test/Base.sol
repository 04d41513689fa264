// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";

import {IERC8183, IJobEscrow} from "../src/IJobEscrow.sol";
import {Vm, vm} from "./Vm.sol";

interface ITypeHashes {
    function WORK_TYPEHASH() external view returns (bytes32);
    function TERMS_TYPEHASH() external view returns (bytes32);
    function SETTLEMENT_TYPEHASH() external view returns (bytes32);
    function DELIVERY_TYPEHASH() external view returns (bytes32);
    function DISPUTE_TYPEHASH() external view returns (bytes32);
    function ANSWER_TYPEHASH() external view returns (bytes32);
    function RULING_TYPEHASH() external view returns (bytes32);
}

interface IEscrowFactory {
    event EscrowDeployed(address indexed token, address indexed escrow);

    function deploy(address token) external returns (address);
    function escrowOf(address token) external view returns (address);
    function isEscrow(address escrow) external view returns (bool);
}

/// @notice A world of one token, one escrow, a buyer, a seller, an arbiter and a stranger, and the
/// digests and signatures written out anew, so that a slip in the contract is not repeated here.
abstract contract Base {
    uint8 internal constant WORKING = 1;
    uint8 internal constant DELIVERED = 2;
    uint8 internal constant DISPUTED = 3;
    uint8 internal constant ANSWERED = 4;
    uint8 internal constant CLOSED = 16;
    uint8 internal constant CANCELLED = 31;

    uint256 internal constant START = 1_800_000_000;
    uint256 internal constant PRICE = 1000;
    uint256 internal constant BOND = 90;
    uint256 internal constant BUYER_KEY = 0xB0B;
    uint256 internal constant SELLER_KEY = 0x5E11;
    uint256 internal constant ARBITER_KEY = 0xA4B;
    uint256 internal constant STRANGER_KEY = 0x57;
    bytes32 internal constant WORK_HASH = keccak256("the work");
    bytes32 internal constant RESULT = keccak256("the result");
    bytes32 internal constant EVIDENCE = keccak256("the evidence");

    address internal buyer = vm.addr(BUYER_KEY);
    address internal seller = vm.addr(SELLER_KEY);
    address internal arbiter = vm.addr(ARBITER_KEY);
    address internal stranger = vm.addr(STRANGER_KEY);

    IERC20 internal token;
    IJobEscrow internal escrow;

    function setUp() public virtual {
        vm.warp(START);
        vm.label(buyer, "buyer");
        vm.label(seller, "seller");
        vm.label(arbiter, "arbiter");
        vm.label(stranger, "stranger");
        useToken(create("CoaseToken", abi.encode(address(this))));
        token.transfer(buyer, 1_000_000);
        token.transfer(seller, 1_000_000);
    }

    function useToken(address token_) internal {
        token = IERC20(token_);
        escrow = IJobEscrow(create("JobEscrow", abi.encode(token_)));
        vm.label(token_, "token");
        vm.label(address(escrow), "escrow");
        allow(buyer);
        allow(seller);
    }

    function allow(address from) internal {
        vm.prank(from);
        token.approve(address(escrow), type(uint256).max);
    }

    // ------------------------------------------------------------------------------- artifacts

    function create(string memory name, bytes memory arguments) internal returns (address deployed) {
        bytes memory code = bytes.concat(creationCode(name), arguments);
        assembly ("memory-safe") {
            deployed := create(0, add(code, 0x20), mload(code))
        }
        require(deployed != address(0), "not deployed");
    }

    function creationCode(string memory name) internal view returns (bytes memory) {
        string memory folder = vm.envOr("COASE_ARTIFACTS", "artifacts");
        return vm.parseJsonBytes(vm.readFile(string.concat(folder, "/", name, ".json")), ".bytecode");
    }

    // ----------------------------------------------------------------------------------- terms

    function someTerms() internal view returns (IJobEscrow.Terms memory terms) {
        terms.buyer = buyer;
        terms.seller = seller;
        terms.asset = address(token);
        terms.price = PRICE;
        terms.arbiter = arbiter;
        terms.bond = BOND;
        terms.defaultToSeller = 400;
        terms.lockBy = block.timestamp + 600;
        terms.deliverBy = block.timestamp + 3600;
        terms.disputeSecs = 1000;
        terms.answerSecs = 2000;
        terms.ruleSecs = 3000;
        terms.work = WORK_HASH;
        terms.nonce = 7;
    }

    function expiry(IJobEscrow.Terms memory t) internal pure returns (uint256) {
        return t.deliverBy + t.disputeSecs + t.answerSecs + t.ruleSecs + 1;
    }

    // --------------------------------------------------------------------------------- digests

    function separatorOf(address verifier, uint256 chain) internal pure returns (bytes32) {
        return keccak256(
            abi.encode(
                keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"),
                keccak256("Coase JobEscrow"),
                keccak256("1"),
                chain,
                verifier
            )
        );
    }

    function digestOf(bytes32 structHash) internal view returns (bytes32) {
        return keccak256(abi.encodePacked(hex"1901", separatorOf(address(escrow), block.chainid), structHash));
    }

    function termsHash(IJobEscrow.Terms memory t) internal pure returns (bytes32) {
        bytes memory head = abi.encode(
            keccak256(
                "Terms(address buyer,address seller,address asset,uint256 price,address arbiter,uint256 bond,uint256 defaultToSeller,uint256 lockBy,uint256 deliverBy,uint256 disputeSecs,uint256 answerSecs,uint256 ruleSecs,address vault,uint256 stake,Work work,uint256 nonce)Work(string capability,bytes32 schemas,bytes32 task,string pricing,uint256 inputPrice,uint256 cachedInputPrice,uint256 outputPrice,uint256 secondPrice,uint256 inputMax,uint256 outputMax,uint256 quality,string model,string verification,string tokenizer,string settlement)"
            ),
            t.buyer,
            t.seller,
            t.asset,
            t.price,
            t.arbiter,
            t.bond,
            t.defaultToSeller
        );
        return keccak256(
            bytes.concat(
                head,
                abi.encode(
                    t.lockBy, t.deliverBy, t.disputeSecs, t.answerSecs, t.ruleSecs, t.vault, t.stake, t.work, t.nonce
                )
            )
        );
    }

    function idOf(IJobEscrow.Terms memory t) internal view returns (uint256) {
        return uint256(digestOf(termsHash(t)));
    }

    function settlementDigest(uint256 id, bytes32 deliverable, uint256 toSeller) internal view returns (bytes32) {
        return digestOf(
            keccak256(
                abi.encode(
                    keccak256("Settlement(uint256 jobId,bytes32 deliverable,uint256 toSeller)"),
                    id,
                    deliverable,
                    toSeller
                )
            )
        );
    }

    function deliveryDigest(uint256 id, bytes32 deliverable) internal view returns (bytes32) {
        return digestOf(
            keccak256(abi.encode(keccak256("Delivery(uint256 jobId,bytes32 deliverable)"), id, deliverable))
        );
    }

    function disputeDigest(uint256 id, bytes32 evidence) internal view returns (bytes32) {
        return digestOf(keccak256(abi.encode(keccak256("Dispute(uint256 jobId,bytes32 evidence)"), id, evidence)));
    }

    function answerDigest(uint256 id, bytes32 evidence) internal view returns (bytes32) {
        return digestOf(keccak256(abi.encode(keccak256("Answer(uint256 jobId,bytes32 evidence)"), id, evidence)));
    }

    function rulingDigest(uint256 id, uint256 toSeller, uint256 penalty, bytes32 evidence)
        internal
        view
        returns (bytes32)
    {
        return digestOf(
            keccak256(
                abi.encode(
                    keccak256("Ruling(uint256 jobId,uint256 toSeller,uint256 penalty,bytes32 evidence)"),
                    id,
                    toSeller,
                    penalty,
                    evidence
                )
            )
        );
    }

    // ------------------------------------------------------------------------------ signatures

    function sign(uint256 key, bytes32 digest) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        return abi.encodePacked(r, s, v);
    }

    function signTerms(uint256 key, IJobEscrow.Terms memory t) internal view returns (bytes memory) {
        return sign(key, bytes32(idOf(t)));
    }

    // --------------------------------------------------------------------------------- funding

    function byAllowance() internal pure returns (IJobEscrow.Funding memory funding) {}

    function byPermit(uint256 key, uint256 amount, uint256 deadline)
        internal
        view
        returns (IJobEscrow.Funding memory)
    {
        bytes32 structHash = keccak256(
            abi.encode(
                keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"),
                vm.addr(key),
                address(escrow),
                amount,
                IERC20Permit(address(token)).nonces(vm.addr(key)),
                deadline
            )
        );
        return IJobEscrow.Funding(1, 0, deadline, sign(key, tokenDigest(structHash)));
    }

    function byAuthorization(uint256 key, uint256 amount, bytes32 nonce)
        internal
        view
        returns (IJobEscrow.Funding memory)
    {
        uint256 validBefore = block.timestamp + 600;
        bytes32 structHash = keccak256(
            abi.encode(
                keccak256(
                    "ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
                ),
                vm.addr(key),
                address(escrow),
                amount,
                0,
                validBefore,
                nonce
            )
        );
        return IJobEscrow.Funding(2, 0, validBefore, sign(key, tokenDigest(structHash)));
    }

    function tokenDigest(bytes32 structHash) internal view returns (bytes32) {
        return keccak256(
            abi.encodePacked(hex"1901", IERC20Permit(address(token)).DOMAIN_SEPARATOR(), structHash)
        );
    }

    // ------------------------------------------------------------------------- steps of a deal

    function open(IJobEscrow.Terms memory t) internal returns (uint256 id) {
        bytes memory sellerSig = signTerms(SELLER_KEY, t);
        vm.prank(t.buyer);
        return escrow.open(t, "", sellerSig, byAllowance());
    }

    function submit(uint256 id) internal {
        vm.prank(seller);
        escrow.submit(id, RESULT, "");
    }

    function dispute(IJobEscrow.Terms memory t) internal {
        vm.prank(t.buyer);
        escrow.dispute(t, EVIDENCE, "", byAllowance());
    }

    function answer(IJobEscrow.Terms memory t) internal {
        vm.prank(t.seller);
        escrow.answer(t, EVIDENCE, "", byAllowance());
    }

    function openSubmitted(IJobEscrow.Terms memory t) internal returns (uint256 id) {
        id = open(t);
        submit(id);
    }

    function openDisputed(IJobEscrow.Terms memory t) internal returns (uint256 id) {
        id = openSubmitted(t);
        dispute(t);
    }

    function openAnswered(IJobEscrow.Terms memory t) internal returns (uint256 id) {
        id = openDisputed(t);
        answer(t);
    }

    // ----------------------------------------------------------------------------------- reads

    function phaseOf(uint256 id) internal view returns (uint8 phase) {
        (, phase,,,,,) = escrow.deal(id);
    }

    function statusOf(uint256 id) internal view returns (IERC8183.Status status) {
        (status,,,,,,) = escrow.deal(id);
    }

    function clockOf(uint256 id) internal view returns (uint256 clock) {
        (,,, clock,,,) = escrow.deal(id);
    }

    function wealth(address who) internal view returns (uint256) {
        return token.balanceOf(who) + escrow.owed(who);
    }

    function checkState(uint256 id, IERC8183.Status status, uint8 phase) internal view {
        vm.assertEq(uint256(statusOf(id)), uint256(status), "status");
        vm.assertEq(uint256(phaseOf(id)), uint256(phase), "phase");
    }

    function checkClosed(uint256 id, IERC8183.Status status, IJobEscrow.How how) internal view {
        checkState(id, status, CLOSED + uint8(how));
        (IJobEscrow.How told,) = escrow.outcome(id);
        vm.assertEq(uint256(told), uint256(how), "outcome");
    }
}
